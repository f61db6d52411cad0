// The kernels of rows.h over the vectors of one instruction set. A file includes this inside its own unnamed namespace
// after its vectors and exponential.h, so that nothing is shared with other instruction sets.

// `count` values, at most a vector; lanes behind them are `rest`.
inline Vec load(const float* p, int64_t count, float rest = 0.0f) {
    if (count == kLanes) return load(p);
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? p[i] : rest;
    return load(lanes);
}

inline void store(float* p, Vec v, int64_t count) {
    if (count == kLanes) return store(p, v);
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// f(i, lanes) for the vectors of n values, the last of them possibly in part.
template <class F>
inline void over(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
    if (i < n) f(i, n - i);
}

// The sum of squares of x, or of x + residual, which goes to `sum`.
template <bool ADD>
inline float squares(const float* x, const float* residual, int64_t n, float* sum) {
    constexpr int kSums = 4;  // each waits for the one before
    Vec total[kSums];
    for (int s = 0; s < kSums; ++s) total[s] = set(0.0f);
    const auto next = [&](int64_t i, int64_t lanes, Vec& mine) {
        Vec v = load(x + i, lanes);
        if constexpr (ADD) {
            v = v + load(residual + i, lanes);
            store(sum + i, v, lanes);
        }
        mine = fma(v, v, mine);
    };
    int64_t i = 0;
    for (; i + kSums * kLanes <= n; i += kSums * kLanes) {
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) next(i + s * kLanes, kLanes, total[s]);
    }
    over(n - i, [&](int64_t j, int64_t lanes) { next(i + j, lanes, total[0]); });
    return sum_of((total[0] + total[1]) + (total[2] + total[3]));
}

void rms_norm(const float* x, const float* residual, const float* weight, int64_t n, float eps, float* sum,
              float* out) {
    const float total = residual == nullptr ? squares<false>(x, nullptr, n, nullptr) : squares<true>(x, residual, n, sum);
    const float* from = residual == nullptr ? x : sum;
    const Vec factor = set(1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps));
    over(n, [&](int64_t i, int64_t lanes) {
        store(out + i, load(from + i, lanes) * factor * load(weight + i, lanes), lanes);
    });
}

void silu_mul(const float* gate, const float* up, int64_t n, float* out) {
    over(n, [&](int64_t i, int64_t lanes) {
        const Vec g = load(gate + i, lanes);
        // From 88 on the exponential would leave float32; what it divides is as good as zero there.
        const Vec silu = g / (set(1.0f) + exponential(least(set(88.0f), set(0.0f) - g)));
        store(out + i, silu * load(up + i, lanes), lanes);
    });
}

inline int64_t first_bit(unsigned bits) { return __builtin_ctz(bits); }

int64_t argmax(const float* x, int64_t n) {
    constexpr int64_t kBlock = 512;
    const float lowest = -__builtin_inff();
    float best = lowest;
    int64_t found = -1;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
        const int64_t count = n - begin < kBlock ? n - begin : kBlock;
        Vec most = set(lowest);
        unsigned strange = 0;
        over(count, [&](int64_t i, int64_t lanes) {
            const Vec v = load(x + begin + i, lanes, lowest);
            strange |= not_a_number(v);
            most = greatest(v, most);
        });
        if (strange != 0) {
            for (int64_t i = begin;; ++i) {
                if (x[i] != x[i]) return i;
            }
        }
        if (found >= 0 && at_least(set(best), most) == (1u << (kLanes - 1)) * 2u - 1u) continue;
        for (int64_t i = begin; i < begin + count; ++i) {
            if (found < 0 || x[i] > best) best = x[i], found = i;
        }
    }
    return found;
}

void scale(const float* x, int64_t n, float most, float temperature, float* out, float* tops) {
    const Vec subtract = set(most), divisor = set(temperature);
    for (int64_t begin = 0; begin < n; begin += kTopOf) {
        const int64_t count = n - begin < kTopOf ? n - begin : kTopOf;
        Vec top = set(-__builtin_inff());
        over(count, [&](int64_t i, int64_t lanes) {
            const Vec v = (load(x + begin + i, lanes, -__builtin_inff()) - subtract) / divisor;
            store(out + begin + i, v, lanes);
            top = greatest(top, v);
        });
        tops[begin / kTopOf] = largest_of(top);
    }
}

int64_t at_least(const float* x, int64_t n, float bound, float* out) {
    int64_t found = 0;
    over(n, [&](int64_t i, int64_t lanes) {
        unsigned bits = at_least(load(x + i, lanes), set(bound));
        if (lanes < kLanes) bits &= (1u << lanes) - 1u;
        for (; bits != 0; bits &= bits - 1) out[found++] = x[i + first_bit(bits)];
    });
    return found;
}

double exponentials(const float* x, int64_t n, float bound, float* out) {
    WideSum sum;
    const Vec limit = set(bound);
    over(n, [&](int64_t i, int64_t lanes) {
        const Vec v = load(x + i, lanes, -__builtin_inff());
        if (at_least(v, limit) == 0) return store(out + i, set(0.0f), lanes);
        const Vec e = zero_below(v, limit, exponential(v));
        store(out + i, e, lanes);
        sum.add(e);
    });
    return sum.total();
}

void shares(float* x, int64_t n, float total, float floor, double* sums) {
    for (int64_t begin = 0; begin < n; begin += kShares) {
        const int64_t count = n - begin < kShares ? n - begin : kShares;
        WideSum sum;
        over(count, [&](int64_t i, int64_t lanes) {
            const Vec share = load(x + begin + i, lanes) / set(total);
            const Vec kept = zero_below(share, set(floor), share);
            store(x + begin + i, kept, lanes);
            sum.add(kept);
        });
        sums[begin / kShares] = sum.total();
    }
}

void to_bfloat16(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        const uint32_t magnitude = bits & 0x7fffffff, rounded_bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        const uint32_t sign = bits >> 16 & 0x8000;
        const uint32_t finite = magnitude > 0x7f7f0000 ? sign | 0x7f7f : rounded_bits;
        out[i] = static_cast<uint16_t>(magnitude > 0x7f800000 ? sign | 0x7fc0 : finite);
    }
}

void to_float16(const float* x, int64_t n, uint16_t* out) {
    over(n, [&](int64_t i, int64_t lanes) {
        // In this order NaN passes.
        const Vec v = least(set(65504.0f), greatest(set(-65504.0f), load(x + i, lanes)));
        if (lanes == kLanes) return store_float16(out + i, v);
        uint16_t halves[kLanes];
        store_float16(halves, v);
        for (int64_t j = 0; j < lanes; ++j) out[i + j] = halves[j];
    });
}

constexpr RowKernels kRows = {rms_norm, silu_mul, argmax, scale, at_least, exponentials, shares, to_bfloat16,
                              to_float16};
