// The vectors of AVX-512 (F, BW and VL). A file includes this inside its own unnamed namespace, after immintrin.h.

using Vec = __m512;
constexpr int64_t kLanes = 16;

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
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

// One bit a lane, the first the lowest.
inline unsigned at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline unsigned equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline unsigned not_a_number(Vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }

// A sum of many floats in double.
struct WideSum {
    __m512d sum = _mm512_setzero_pd();
    void add(Vec v) {
        sum = _mm512_add_pd(
            sum, _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(upper(v))));
    }
    double total() const { return _mm512_reduce_add_pd(sum); }
};

inline void store_float16(uint16_t* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
