// The products of bytes for AVX-512 with VNNI: sixteen outputs at once, four inputs an instruction, exact in 32 bits.
//
// The instruction takes weights without a sign: 8-bit weights are read as w + 128, and as with Q4_0's 8 the zero point
// times the sum of the activations is taken off again, by what the sums start from.
#include <immintrin.h>

#include "kernels.h"

namespace hotplug {
namespace {

using Vec = __m512;
using Ints = __m512i;

inline Vec load_halves(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline Ints load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }

inline Ints broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

template <int KIND>
inline void load_group(const uint8_t* lines, Ints* w) {
    if constexpr (KIND == kQ8_0) {
        for (int l = 0; l < 8; ++l) w[l] = _mm512_xor_si512(load_bytes(lines + 64 * l), _mm512_set1_epi8(-128));
    } else {
        const Ints low = _mm512_set1_epi8(15);
        for (int l = 0; l < 4; ++l) {
            const Ints line = load_bytes(lines + 64 * l);
            w[l] = _mm512_and_si512(line, low);
            w[4 + l] = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
        }
    }
}

// `fresh` says that the tile may not be in the cache yet.
template <int KIND, int ROWS>
inline void rows(const uint8_t* tile, bool fresh, Next& next, const Activations& x, int64_t row, const float* bias, float* out,
                 int64_t out_stride) {
    Vec total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = _mm512_loadu_ps(bias);
    for (int64_t g = 0; g < x.groups; ++g) {
        const uint8_t* group = tile + g * group_bytes(KIND);
        if (fresh) {
            prefetch(group, group_bytes(KIND));
        } else {
            next.ask();
        }
        Ints w[8];
        load_group<KIND>(group + quants_offset(KIND), w);
        const Vec scale = load_halves(group);
        const Vec min = KIND == kQ4_1 ? load_halves(group + kScaleBytes) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const int64_t at = (row + r) * x.groups + g;
            const int8_t* q = x.q + at * kGroup;
            // Two sums, because each step of a sum waits for the one before.
            Ints even = KIND == kQ4_1 ? _mm512_setzero_si512() : _mm512_set1_epi32(x.offset[at]);
            Ints odd = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int l = 0; l < 8; l += 2) {
                even = _mm512_dpbusd_epi32(even, w[l], broadcast4(q + 4 * l));
                odd = _mm512_dpbusd_epi32(odd, w[l + 1], broadcast4(q + 4 * l + 4));
            }
            const Vec dot = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
            if (KIND == kQ4_1) total[r] = _mm512_fmadd_ps(min, _mm512_set1_ps(x.sum[at]), total[r]);
            total[r] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(x.scale[at])), dot, total[r]);
        }
    }
    for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(out + r * out_stride, total[r]);
}

template <int KIND>
void tile(const uint8_t* tile, const Activations& x, int64_t first, int64_t count, const float* bias, float* out,
          int64_t out_stride) {
    Next next(tile, x.groups * group_bytes(KIND), ((count + 7) / 8 - 1) * x.groups);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        rows<KIND, 8>(tile, i == 0, next, x, first + i, bias, out + i * out_stride, out_stride);
    }
    if (count - i >= 4) {
        rows<KIND, 4>(tile, i == 0, next, x, first + i, bias, out + i * out_stride, out_stride);
        i += 4;
    }
    if (count - i >= 2) {
        rows<KIND, 2>(tile, i == 0, next, x, first + i, bias, out + i * out_stride, out_stride);
        i += 2;
    }
    if (count > i) rows<KIND, 1>(tile, i == 0, next, x, first + i, bias, out + i * out_stride, out_stride);
}

}  // namespace

// The rest is AVX2's: memory and division bound it.
const Kernels kAvx512Vnni = {"avx512_vnni", nullptr, tile<kQ4_0>, tile<kQ4_1>, tile<kQ8_0>, nullptr, nullptr, 128,
                             &kRowsAvx512};

}  // namespace hotplug
