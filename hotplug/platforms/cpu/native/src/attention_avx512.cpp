// Attention for AVX-512 (F, BW and VL).
#include <immintrin.h>

#include "attention.h"

namespace hotplug {
namespace {

using Vec = __m512;
constexpr int64_t kLanes = 16;
constexpr int kColumns = 4;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec set(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Of two the second if one is NaN.
inline Vec greatest(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec rounded(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline Vec zero_below(Vec x, Vec limit, Vec y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), y);
}
inline float first_of(Vec v) { return _mm512_cvtss_f32(v); }
inline float sum_of(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest_of(Vec v) { return _mm512_reduce_max_ps(v); }

inline __m256 upper(Vec v) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}

inline __m128 sums_of(Vec a, Vec b, Vec c, Vec d) {
    const auto half = [](Vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), upper(v)); };
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

#include "attention_heads.h"
#include "attention_tiles.h"

}  // namespace

const AttentionKernels kAttentionAvx512 = {attend, merge, kLanes, 48};

}  // namespace hotplug
