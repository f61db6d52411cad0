// The kernels for AVX2 with FMA and F16C, which every x86 processor since 2013 (Intel) and 2015 (AMD) has.
//
// A product of bytes (pmaddubsw) adds two neighbours and saturates at 16 bits, which must never happen:
// - 4-bit weights: |sum of two| <= 2 x 15 x 127 = 3,810, so that even the eight of a group, 30,480, fit 16 bits. They
//   are added there and widened once a group.
// - 8-bit weights: |w| times x with w's sign: <= 2 x 128 x 127 = 32,512. It fits, but two of them would not.
#include <immintrin.h>

#include "kernels.h"

namespace hotplug {
namespace {

using Vec = __m256;
using Ints = __m256i;

inline Vec load_halves(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Ints load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Ints*>(p)); }

// Four bytes of activations for every output.
inline Ints broadcast4(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

inline float sum_of(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline int32_t sum_of(Ints v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

inline int32_t max_of(Ints v) {
    __m128i s = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

void quantize(const float* x, int64_t groups, int32_t zero_point, int8_t* q, float* scale, float* sum,
              int32_t* offset) {
    const Ints magnitude = _mm256_set1_epi32(0x7fffffff), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t g = 0; g < groups; ++g, x += kGroup, q += kGroup) {
        Vec v[4];
        Ints bits = _mm256_setzero_si256();  // as integers, magnitudes keep their order and NaN is above infinity
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_loadu_ps(x + 8 * i);
            bits = _mm256_max_epi32(bits, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
        }
        const int32_t largest_bits = max_of(bits);
        float largest;
        __builtin_memcpy(&largest, &largest_bits, 4);
        const bool finite = largest_bits < 0x7f800000;
        if (!finite || largest < 0x1p-118f) {
            _mm256_storeu_si256(reinterpret_cast<Ints*>(q), _mm256_setzero_si256());
            scale[g] = sum[g] = finite ? 0.0f : __builtin_nanf("");
            offset[g] = 0;
            continue;
        }
        const Vec inverse = _mm256_set1_ps(127.0f / largest);
        Ints n[4];
        for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
        const Ints sums = _mm256_add_epi32(_mm256_add_epi32(n[0], n[1]), _mm256_add_epi32(n[2], n[3]));
        const Ints bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
        _mm256_storeu_si256(reinterpret_cast<Ints*>(q), _mm256_permutevar8x32_epi32(bytes, order));
        scale[g] = largest / 127.0f;
        const int32_t total = sum_of(sums);
        offset[g] = -zero_point * total;
        sum[g] = scale[g] * static_cast<float>(total);
    }
}

// The scaled sums of one group and eight outputs onto `total`.
template <int KIND>
inline Vec accumulate(Vec total, Ints dot, Vec scale, Vec min, const Activations& x, int64_t at) {
    if (KIND == kQ4_0) dot = _mm256_add_epi32(dot, _mm256_set1_epi32(x.offset[at]));
    if (KIND == kQ4_1) total = _mm256_fmadd_ps(min, _mm256_broadcast_ss(x.sum + at), total);
    return _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_broadcast_ss(x.scale + at)), _mm256_cvtepi32_ps(dot), total);
}

// ROWS activation rows and the eight outputs of the tile from `half` on: 4-bit weights are unpacked once for all rows.
template <int KIND, int ROWS>
inline void group4(const uint8_t* group, int half, const Activations& x, int64_t row, int64_t g, Vec* total) {
    const Ints low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const uint8_t* lines = group + quants_offset(KIND) + 32 * half;
    Ints w[8];
    for (int l = 0; l < 4; ++l) {
        const Ints line = load_bytes(lines + 64 * l);
        w[l] = _mm256_and_si256(line, low);
        w[4 + l] = _mm256_and_si256(_mm256_srli_epi16(line, 4), low);
    }
    const Vec scale = load_halves(group + 16 * half);
    const Vec min = KIND == kQ4_1 ? load_halves(group + kScaleBytes + 16 * half) : _mm256_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        const int64_t at = (row + r) * x.groups + g;
        const int8_t* q = x.q + at * kGroup;
        Ints pairs = _mm256_maddubs_epi16(w[0], broadcast4(q));
#pragma GCC unroll 8
        for (int l = 1; l < 8; ++l) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[l], broadcast4(q + 4 * l)));
        total[r] = accumulate<KIND>(total[r], _mm256_madd_epi16(pairs, ones), scale, min, x, at);
    }
}

template <int ROWS>
inline void group8(const uint8_t* group, int half, const Activations& x, int64_t row, int64_t g, Vec* total) {
    const Ints ones = _mm256_set1_epi16(1);
    const uint8_t* lines = group + quants_offset(kQ8_0) + 32 * half;
    const Vec scale = load_halves(group + 16 * half);
    const int64_t at = row * x.groups + g;
    Ints dot[ROWS];
    for (int r = 0; r < ROWS; ++r) dot[r] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int l = 0; l < 8; ++l) {
        const Ints w = load_bytes(lines + 64 * l), magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Ints q = broadcast4(x.q + (at + r * x.groups) * kGroup + 4 * l);
            const Ints pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(q, w));
            dot[r] = _mm256_add_epi32(dot[r], _mm256_madd_epi16(pairs, ones));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        total[r] = accumulate<kQ8_0>(total[r], dot[r], scale, scale, x, at + r * x.groups);
    }
}

template <int KIND, int ROWS>
inline void group(const uint8_t* group, int half, const Activations& x, int64_t row, int64_t g, Vec* total) {
    if constexpr (KIND == kQ8_0) {
        group8<ROWS>(group, half, x, row, g, total);
    } else {
        group4<KIND, ROWS>(group, half, x, row, g, total);
    }
}

// `fresh` says that the tile may not be in the cache yet.
template <int KIND, int ROWS>
inline void rows(const uint8_t* tile, bool fresh, Next& next, const Activations& x, int64_t row, const float* bias,
                 float* out, int64_t out_stride) {
    // One row reads the weights from memory: both halves at once, so that they are read in order. More would not find
    // registers enough that way, and find the tile in the cache anyway.
    constexpr int kTogether = ROWS == 1 ? 2 : 1;
    for (int first = 0; first < 2; first += kTogether) {
        Vec total[kTogether][ROWS];
        for (int h = 0; h < kTogether; ++h) {
            for (int r = 0; r < ROWS; ++r) total[h][r] = _mm256_loadu_ps(bias + 8 * (first + h));
        }
        for (int64_t g = 0; g < x.groups; ++g) {
            if (fresh && first == 0) {
                prefetch(tile + g * group_bytes(KIND), group_bytes(KIND));
            } else {
                next.ask();
            }
            for (int h = 0; h < kTogether; ++h) {
                group<KIND, ROWS>(tile + g * group_bytes(KIND), first + h, x, row, g, total[h]);
            }
        }
        for (int h = 0; h < kTogether; ++h) {
            for (int r = 0; r < ROWS; ++r) _mm256_storeu_ps(out + r * out_stride + 8 * (first + h), total[h][r]);
        }
    }
}

template <int KIND>
void tile(const uint8_t* tile, const Activations& x, int64_t first, int64_t count, const float* bias, float* out,
          int64_t out_stride) {
    // Four rows go over the tile twice, once for each half.
    Next next(tile, x.groups * group_bytes(KIND), ((count + 3) / 4 * 2 - 1) * x.groups);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        rows<KIND, 4>(tile, i == 0, next, x, first + i, bias, out + i * out_stride, out_stride);
    }
    float* rest = out + i * out_stride;
    switch (count - i) {
        case 1: rows<KIND, 1>(tile, i == 0, next, x, first + i, bias, rest, out_stride); break;
        case 2: rows<KIND, 2>(tile, i == 0, next, x, first + i, bias, rest, out_stride); break;
        case 3: rows<KIND, 3>(tile, i == 0, next, x, first + i, bias, rest, out_stride); break;
        default: break;
    }
}

// e^x by 2^n times a polynomial of the rest, |rest| <= ln 2 / 2; error below 2 units in the last place.
inline Vec exp(Vec x) {
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(_mm256_set1_ps(-87.0f), x));
    const Vec n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), 8);
    Vec r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // ln 2 in two parts, so that the rest is exact
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    Vec p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const Ints power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

void silu_mul(const float* gate, const float* up, float* out) {
    const Vec one = _mm256_set1_ps(1.0f);
    for (int i = 0; i < kTile; i += 8) {
        const Vec g = _mm256_loadu_ps(gate + i);
        const Vec silu = _mm256_div_ps(g, _mm256_add_ps(one, exp(_mm256_sub_ps(_mm256_setzero_ps(), g))));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
}

// OUTS rows of w with ROWS of x: each vector that is loaded serves OUTS or ROWS products. Asks for the `soon_count` rows
// of w from `soon` on meanwhile.
template <int OUTS, int ROWS>
inline void block_f32(const float* w, int64_t w_stride, const float* soon, int64_t soon_count, int64_t cols,
                      const float* x, int64_t x_stride, const float* bias, float* out, int64_t out_stride) {
    Vec total[OUTS][ROWS] = {};
    int64_t c = 0;
    for (; c + 8 <= cols; c += 8) {
        if (c % 16 == 0) {
            for (int64_t o = 0; o < soon_count; ++o) __builtin_prefetch(soon + o * w_stride + c);
        }
        Vec b[ROWS];
        for (int r = 0; r < ROWS; ++r) b[r] = _mm256_loadu_ps(x + r * x_stride + c);
        for (int o = 0; o < OUTS; ++o) {
            const Vec a = _mm256_loadu_ps(w + o * w_stride + c);
            for (int r = 0; r < ROWS; ++r) total[o][r] = _mm256_fmadd_ps(a, b[r], total[o][r]);
        }
    }
    for (int o = 0; o < OUTS; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            float rest = bias ? bias[o] : 0.0f;
            for (int64_t t = c; t < cols; ++t) rest += w[o * w_stride + t] * x[r * x_stride + t];
            out[r * out_stride + o] = rest + sum_of(total[o][r]);
        }
    }
}

// OUTS rows of w with all of x, three at a time; each time it asks for its share of the next OUTS.
template <int OUTS>
inline void all_rows_f32(const float* w, int64_t w_stride, int64_t cols, const float* x, int64_t n, int64_t x_stride,
                         const float* bias, float* out, int64_t out_stride) {
    const int64_t times = (n + 2) / 3;
    for (int64_t i = 0; i < times; ++i) {
        const int64_t first = i * OUTS / times, last = (i + 1) * OUTS / times;
        const float *soon = w + (OUTS + first) * w_stride, *mine = x + 3 * i * x_stride;
        float* target = out + 3 * i * out_stride;
        switch (n - 3 * i) {
            case 1:
                block_f32<OUTS, 1>(w, w_stride, soon, last - first, cols, mine, x_stride, bias, target, out_stride);
                break;
            case 2:
                block_f32<OUTS, 2>(w, w_stride, soon, last - first, cols, mine, x_stride, bias, target, out_stride);
                break;
            default:
                block_f32<OUTS, 3>(w, w_stride, soon, last - first, cols, mine, x_stride, bias, target, out_stride);
                break;
        }
    }
}

void linear_f32(const float* w, int64_t w_stride, int64_t begin, int64_t end, int64_t cols, const float* x, int64_t n,
                int64_t x_stride, const float* bias, float* out, int64_t out_stride) {
    for (int64_t o = begin; o < end;) {
        const float *mine = w + o * w_stride, *offsets = bias ? bias + o : nullptr;
        if (end - o >= 4) {
            all_rows_f32<4>(mine, w_stride, cols, x, n, x_stride, offsets, out + o, out_stride);
            o += 4;
        } else {
            all_rows_f32<1>(mine, w_stride, cols, x, n, x_stride, offsets, out + o, out_stride);
            o += 1;
        }
    }
}

}  // namespace

const Kernels kAvx2 = {"avx2", quantize, tile<kQ4_0>, tile<kQ4_1>, tile<kQ8_0>, silu_mul, linear_f32, 0,
                       &kRowsAvx2};

}  // namespace hotplug
