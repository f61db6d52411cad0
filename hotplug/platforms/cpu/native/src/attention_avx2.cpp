// Attention for AVX2 with FMA and F16C.
#include <immintrin.h>

#include "attention.h"

namespace hotplug {
namespace {

using Vec = __m256;
constexpr int64_t kLanes = 8;
constexpr int kColumns = 2;

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec set(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// Of two the second if one is NaN.
inline Vec greatest(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec least(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec rounded(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Vec zero_below(Vec x, Vec limit, Vec y) { return _mm256_and_ps(y, _mm256_cmp_ps(x, limit, _CMP_NLT_UQ)); }
inline float first_of(Vec v) { return _mm256_cvtss_f32(v); }

inline float sum_of(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline float largest_of(Vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline __m128 sums_of(Vec a, Vec b, Vec c, Vec d) {
    const Vec s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

#include "attention_heads.h"
#include "attention_tiles.h"

}  // namespace

const AttentionKernels kAttentionAvx2 = {attend, merge, kLanes, 48};

}  // namespace hotplug
