// Vectors of one float, in plain C++. A file includes this inside its own unnamed namespace.

using Vec = float;
constexpr int64_t kLanes = 1;

inline Vec load(const float* p) { return *p; }
inline void store(float* p, Vec v) { *p = v; }
inline Vec set(float x) { return x; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Of two the second if one is NaN.
inline Vec greatest(Vec a, Vec b) { return a > b ? a : b; }
inline Vec least(Vec a, Vec b) { return a < b ? a : b; }
inline Vec rounded(Vec x) { return __builtin_rintf(x); }
inline Vec power_of_two(Vec n) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return power;
}
inline Vec zero_below(Vec x, Vec limit, Vec y) { return x < limit ? 0.0f : y; }
inline float sum_of(Vec v) { return v; }
inline float largest_of(Vec v) { return v; }

// One bit a lane.
inline unsigned at_least(Vec a, Vec b) { return a >= b; }
inline unsigned equal(Vec a, Vec b) { return a == b; }
inline unsigned not_a_number(Vec a) { return a != a; }

// A sum of many floats in double.
struct WideSum {
    double sum = 0;
    void add(Vec v) { sum += static_cast<double>(v); }
    double total() const { return sum; }
};

// To the nearest, ties to even, as the instruction does it; at most 65504 goes in.
inline void store_float16(uint16_t* p, Vec v) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        *p = static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    } else if (magnitude < 0x38800000) {  // subnormal: a multiple of 2^-24
        *p = static_cast<uint16_t>(sign | static_cast<uint16_t>(__builtin_rintf(__builtin_fabsf(v) * 0x1p24f)));
    } else {
        const uint32_t rebased = magnitude - 0x38000000;
        *p = static_cast<uint16_t>(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
    }
}
