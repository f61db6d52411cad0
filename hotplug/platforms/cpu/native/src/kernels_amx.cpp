// Products of many rows for AMX: tiles of bfloat16 that are summed in float32 (Sapphire Rapids and later).
//
// A tile register holds 16 lines of 64 bytes. Of activations a line is a row's group of 32; of weights it is a pair of
// inputs of 16 outputs, so that a tile is a group of 16 outputs and one instruction multiplies it with 16 rows.
//
// In a group inputs have an order of their own, the one in which the bytes of the packed layout come apart: line
// 4 l + s of weights holds inputs p and p + 2 of each output with p = 4 l + s / 2 + 16 (s % 2).
#include <immintrin.h>

#include "amx.h"

namespace hotplug {
namespace {

using Vec = __m512;
using Ints = __m512i;

#include "amx_tiles.h"

// 32 floats of inputs p in the order of a line.
inline Ints line_of(Vec low, Vec high) {
    static const uint16_t order[32] = {0,  2,  16, 18, 1,  3,  17, 19, 4,  6,  20, 22, 5,  7,  21, 23,
                                       8,  10, 24, 26, 9,  11, 25, 27, 12, 14, 28, 30, 13, 15, 29, 31};
    const Ints both = reinterpret_cast<Ints>(_mm512_cvtne2ps_pbh(high, low));
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}

// Not finite becomes NaN; what would round to infinity the largest finite value.
inline Vec tamed(Vec x) {
    const Vec most = _mm512_set1_ps(0x1.fep127f);
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    x = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, x));
    return _mm512_mask_mov_ps(_mm512_set1_ps(__builtin_nanf("")), finite, x);
}

void round(const float* x, int64_t x_stride, int64_t count, int64_t groups, uint8_t* out) {
    for (int64_t i = 0; i < kTileRows; ++i) {
        for (int64_t g = 0; g < groups; ++g) {
            Ints line = _mm512_setzero_si512();
            if (i < count) {
                const float* from = x + i * x_stride + g * kGroup;
                line = line_of(tamed(_mm512_loadu_ps(from)), tamed(_mm512_loadu_ps(from + 16)));
            }
            _mm512_store_si512(out + g * kTileBytes + i * 64, line);
        }
    }
}

inline Vec load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Two inputs of 16 outputs, rounded and side by side.
inline Ints pairs_of(Vec first, Vec second) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const Ints both = reinterpret_cast<Ints>(_mm512_cvtne2ps_pbh(second, first));
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}

// 0 .. 15, less 8 for Q4_0, as bfloat16; a second time for the bit above that an index may have.
template <int KIND>
inline Ints four_bits() {
    alignas(64) static const uint16_t plain[16] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                   0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    alignas(64) static const uint16_t less8[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                                   0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const uint16_t* table = KIND == kQ4_0 ? less8 : plain;
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
}

template <int KIND>
inline Vec scaled(Vec q, Vec scale, Vec min) {
    return KIND == kQ4_1 ? _mm512_fmadd_ps(q, scale, min) : _mm512_mul_ps(q, scale);
}

// The upper half of each pair as float32; the lower one is in the bits below.
inline Vec upper(Ints pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
inline Vec lower(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

template <int BYTE>
inline Vec byte_of(Ints line) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(BYTE == 3 ? line : _mm512_slli_epi32(line, 24 - 8 * BYTE), 24));
}

template <int KIND>
void widen(const uint8_t* tile, int64_t groups, uint8_t* out) {
    for (int64_t g = 0; g < groups; ++g, tile += group_bytes(KIND), out += kTileBytes) {
        prefetch(tile, group_bytes(KIND));
        const Vec scale = load_halves(tile);
        const Vec min = KIND == kQ4_1 ? load_halves(tile + kScaleBytes) : scale;
        const uint8_t* lines = tile + quants_offset(KIND);
        if constexpr (KIND == kQ8_0) {
            for (int l = 0; l < 8; ++l) {
                const Ints line = _mm512_loadu_si512(lines + 64 * l);
                uint8_t* to = out + 64 * (4 * (l % 4) + l / 4);
                const auto value = [&](Vec q) { return scaled<KIND>(q, scale, min); };
                _mm512_store_si512(to, pairs_of(value(byte_of<0>(line)), value(byte_of<2>(line))));
                _mm512_store_si512(to + 128, pairs_of(value(byte_of<1>(line)), value(byte_of<3>(line))));
            }
        } else {
            const Ints values = four_bits<KIND>();
#pragma GCC unroll 4
            for (int l = 0; l < 4; ++l) {
                const Ints line = _mm512_loadu_si512(lines + 64 * l);
#pragma GCC unroll 4
                for (int s = 0; s < 4; ++s) {
                    const Ints q = _mm512_permutexvar_epi16(_mm512_srli_epi16(line, 4 * s), values);
                    _mm512_store_si512(out + 64 * (4 * l + s), pairs_of(scaled<KIND>(lower(q), scale, min),
                                                                        scaled<KIND>(upper(q), scale, min)));
                }
            }
        }
    }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ROWS x OUTS tiles of results in registers 0 to 3: bias at first, then group after group.
template <int ROWS, int OUTS>
void multiply(const uint8_t* a, const uint8_t* b, int64_t groups, const float* bias, float* out, int64_t out_stride) {
    const int64_t next = groups * kTileBytes;
    settle();
    _tile_loadd(0, bias, 0);
    if (OUTS == 2) _tile_loadd(1, bias + kTile, 0);
    if (ROWS == 2) _tile_loadd(2, bias, 0);
    if (ROWS == 2 && OUTS == 2) _tile_loadd(3, bias + kTile, 0);
    const int64_t lines_each = divide_up(ROWS * kTileRows, groups);  // of results, asked for while groups are summed
    for (int64_t g = 0; g < groups; ++g, a += kTileBytes, b += kTileBytes) {
        for (int64_t i = g * lines_each; i < (g + 1) * lines_each && i < ROWS * kTileRows; ++i) {
            for (int o = 0; o < OUTS; ++o) _m_prefetchw(out + i * out_stride + o * kTile);
        }
        _tile_stream_loadd(4, a, 64);  // which leaves the weights in the nearest cache
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (OUTS == 2) {
            _tile_loadd(7, b + next, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (ROWS == 2) {
            _tile_stream_loadd(5, a + next, 64);
            _tile_dpbf16ps(2, 5, 6);
        }
        if (ROWS == 2 && OUTS == 2) _tile_dpbf16ps(3, 5, 7);
    }
    const int64_t stride = out_stride * 4;
    _tile_stored(0, out, stride);
    if (OUTS == 2) _tile_stored(1, out + kTile, stride);
    if (ROWS == 2) _tile_stored(2, out + kTileRows * out_stride, stride);
    if (ROWS == 2 && OUTS == 2) _tile_stored(3, out + kTileRows * out_stride + kTile, stride);
}

}  // namespace

const TileKernels kAmxTiles = {
    tiles_on, tiles_off, round, widen<kQ4_0>, widen<kQ4_1>, widen<kQ8_0>,
    {{multiply<1, 1>, multiply<1, 2>}, {multiply<2, 1>, multiply<2, 2>}},
};

}  // namespace hotplug
