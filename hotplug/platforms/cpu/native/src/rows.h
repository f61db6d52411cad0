// What an instruction set brings for rows of floats: norms, gates, and what sampling goes over a vocabulary with. Each
// function is single-threaded, and takes rows of any length.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hotplug {

// Two bytes each, which vectors are loaded from.
struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

constexpr int64_t kTopOf = 16;     // values that share an entry of `tops`
constexpr int64_t kShares = 256;   // values that share an entry of `sums`

struct RowKernels {
    // out = x over the root of its mean square plus eps, times weight. With a residual of x + residual, which also goes to
    // `sum`.
    void (*rms_norm)(const float* x, const float* residual, const float* weight, int64_t n, float eps, float* sum,
                     float* out);
    // out = silu(gate) * up.
    void (*silu_mul)(const float* gate, const float* up, int64_t n, float* out);

    // Where the largest value is first; a NaN counts as larger than all others.
    int64_t (*argmax)(const float* x, int64_t n);
    // out = (x - most) / temperature, and the largest of each kTopOf of them to `tops`. No NaN comes of it.
    void (*scale)(const float* x, int64_t n, float most, float temperature, float* out, float* tops);
    // The values of at least `bound`, in order, to `out`, which has room for n; returns their number.
    int64_t (*at_least)(const float* x, int64_t n, float bound, float* out);
    // out = e^x where x is at least `bound`, else 0; returns their sum. x is at most 0.
    double (*exponentials)(const float* x, int64_t n, float bound, float* out);
    // x over `total` in place, 0 where that is less than `floor`; the sum of each kShares of them to `sums`.
    void (*shares)(float* x, int64_t n, float total, float floor, double* sums);

    // Rounded to the nearest; what is too large becomes the largest finite value, and NaN stays.
    void (*to_bfloat16)(const float* x, int64_t n, uint16_t* out);
    void (*to_float16)(const float* x, int64_t n, uint16_t* out);
};

extern const RowKernels kRowsPortable;
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;

}  // namespace hotplug
