// The kernels in plain C++ for the compiler's baseline: any processor runs them, and the others are read against them.
#include <math.h>
#include <string.h>

#include "half.h"
#include "kernels.h"

namespace hotplug {
namespace {

float half_at(const uint8_t* bytes) {
    uint16_t h;
    memcpy(&h, bytes, 2);
    return half_to_float(h);
}

void quantize(const float* x, int64_t groups, int32_t zero_point, int8_t* q, float* scale, float* sum,
              int32_t* offset) {
    for (int64_t g = 0; g < groups; ++g, x += kGroup, q += kGroup) {
        float largest = 0;
        bool finite = true;
        for (int i = 0; i < kGroup; ++i) {
            const float magnitude = fabsf(x[i]);
            finite = finite && magnitude < INFINITY;
            largest = magnitude > largest ? magnitude : largest;
        }
        const bool zero = !finite || largest < 0x1p-118f;
        const float inverse = zero ? 0.0f : 127.0f / largest;
        int32_t total = 0;
        for (int i = 0; i < kGroup; ++i) {
            q[i] = zero ? 0 : static_cast<int8_t>(lrintf(x[i] * inverse));
            total += q[i];
        }
        scale[g] = !finite ? NAN : zero ? 0.0f : largest / 127.0f;
        sum[g] = scale[g] * static_cast<float>(total);
        offset[g] = -zero_point * total;
    }
}

template <int KIND>
void tile(const uint8_t* tile, const Activations& x, int64_t first, int64_t count, const float* bias, float* out,
          int64_t out_stride) {
    for (int64_t i = first; i < first + count; ++i, out += out_stride) {
        float total[kTile];
        memcpy(total, bias, sizeof total);
        for (int64_t g = 0; g < x.groups; ++g) {
            const uint8_t* group = tile + g * group_bytes(KIND);
            const uint8_t* lines = group + quants_offset(KIND);
            const int64_t at = i * x.groups + g;
            const int8_t* q = x.q + at * kGroup;
            int32_t dot[kTile] = {};
            for (int l = 0; l < (KIND == kQ8_0 ? 8 : 4); ++l) {
                for (int b = 0; b < 64; ++b) {
                    const uint8_t byte = lines[l * 64 + b];
                    const int input = 4 * l + b % 4;
                    if (KIND == kQ8_0) {
                        dot[b / 4] += static_cast<int8_t>(byte) * q[input];
                    } else {
                        dot[b / 4] += (byte & 15) * q[input] + (byte >> 4) * q[16 + input];
                    }
                }
            }
            for (int r = 0; r < kTile; ++r) {
                const float centred = static_cast<float>(dot[r] + x.offset[at]);
                total[r] += half_at(group + 2 * r) * x.scale[at] * centred;
                if (KIND == kQ4_1) total[r] += half_at(group + kScaleBytes + 2 * r) * x.sum[at];
            }
        }
        memcpy(out, total, sizeof total);
    }
}

void silu_mul(const float* gate, const float* up, float* out) {
    for (int i = 0; i < kTile; ++i) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

void linear_f32(const float* w, int64_t w_stride, int64_t begin, int64_t end, int64_t cols, const float* x, int64_t n,
                int64_t x_stride, const float* bias, float* out, int64_t out_stride) {
    for (int64_t o = begin; o < end; ++o) {
        for (int64_t i = 0; i < n; ++i) {
            const float *a = w + o * w_stride, *b = x + i * x_stride;
            float part[8] = {};
            int64_t c = 0;
            for (; c + 8 <= cols; c += 8) {
                for (int j = 0; j < 8; ++j) part[j] += a[c + j] * b[c + j];
            }
            for (; c < cols; ++c) part[0] += a[c] * b[c];
            float total = bias ? bias[o] : 0.0f;
            for (int j = 0; j < 4; ++j) total += part[j] + part[4 + j];
            out[i * out_stride + o] = total;
        }
    }
}

}  // namespace

const Kernels kPortable = {"portable", quantize, tile<kQ4_0>, tile<kQ4_1>, tile<kQ8_0>, silu_mul, linear_f32, 0,
                           &kRowsPortable};

}  // namespace hotplug
