// Rotation and cache write, a token at a time: few operations a float, so that the compiler's baseline will do.
#include "rope.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace hotplug {
namespace {

constexpr int64_t kLargestHead = 1024;

// `to` = `from` [dim] with its first 2 * half values rotated.
void rotate(const float* from, const float* cos, const float* sin, int64_t half, int64_t dim, float* __restrict to) {
    for (int64_t d = 0; d < half; ++d) {
        const float first = from[d], second = from[half + d];
        to[d] = first * cos[d] - second * sin[d];
        to[half + d] = second * cos[d] + first * sin[d];
    }
    std::memcpy(to + 2 * half, from + 2 * half, static_cast<size_t>(dim - 2 * half) * 4);
}

// A head's values into a cache of `kind`.
void write(const RowKernels& kernels, int64_t kind, const float* from, int64_t dim, void* cache, int64_t index) {
    if (kind == 0) {
        std::memcpy(static_cast<float*>(cache) + index, from, static_cast<size_t>(dim) * 4);
    } else if (kind == 1) {
        kernels.to_bfloat16(from, dim, static_cast<uint16_t*>(cache) + index);
    } else {
        kernels.to_float16(from, dim, static_cast<uint16_t*>(cache) + index);
    }
}

// Whether all of them are: none has the exponent of infinities and NaN.
bool finite(const float* from, int64_t dim) {
    int32_t most = 0;
    for (int64_t d = 0; d < dim; ++d) {
        int32_t bits;
        std::memcpy(&bits, from + d, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most < 0x7f800000;
}

void token(const hp_rope_kv_write_call& c, const RowKernels& kernels, int64_t t) {
    const int64_t half = c.rotary_dim / 2, block = c.slots[t] / c.block_size, inside = c.slots[t] % c.block_size;
    const float* cos = c.cos_sin + c.positions[t] * c.rotary_dim;
    float even[kLargestHead], turned[kLargestHead];
    const auto normal = [&](const float* head, const float* weight) -> const float* {
        if (weight == nullptr) return head;
        kernels.rms_norm(head, nullptr, weight, c.dim, static_cast<float>(c.eps), nullptr, even);
        return even;
    };
    for (int64_t h = 0; h < c.heads; ++h) {
        const float* q = normal(c.q + t * c.q_token_stride + h * c.q_head_stride, c.q_weight);
        rotate(q, cos, cos + half, half, c.dim, c.out + (t * c.heads + h) * c.dim);
    }
    const int64_t key = block * c.k_cache_block_stride + inside * c.k_cache_token_stride;
    const int64_t value = block * c.v_cache_block_stride + inside * c.v_cache_token_stride;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
        const float* k = normal(c.k + t * c.k_token_stride + h * c.k_head_stride, c.k_weight);
        rotate(k, cos, cos + half, half, c.dim, turned);
        const float* v = c.v + t * c.v_token_stride + h * c.v_head_stride;
        if (!finite(v, c.dim)) {  // stored as 0, which whoever does not see it may multiply, and as NaN in the key
            for (int64_t d = 0; d < c.dim; ++d) {
                even[d] = std::isfinite(v[d]) ? v[d] : 0.0f;
                if (!std::isfinite(v[d])) turned[d] = NAN;
            }
            v = even;
        }
        write(kernels, c.cache_kind, turned, c.dim, c.k_cache, key + h * c.k_cache_head_stride);
        write(kernels, c.cache_kind, v, c.dim, c.v_cache, value + h * c.v_cache_head_stride);
    }
}

}  // namespace

int rope_kv_write(const hp_rope_kv_write_call& c, const RowKernels& kernels, Pool& pool) {
    if (c.rotary_dim < 0 || c.rotary_dim % 2 != 0 || c.rotary_dim > c.dim || c.dim > kLargestHead || c.block_size <= 0 ||
        c.cache_kind < 0 || c.cache_kind > 2) {
        return HP_BAD_ARGUMENT;
    }
    for (int64_t t = 0; t < c.tokens; ++t) {
        if (c.positions[t] < 0 || c.positions[t] >= c.max_position) return HP_BAD_ARGUMENT;
        if (c.slots[t] < 0 || c.slots[t] >= c.num_blocks * c.block_size) return HP_BAD_ARGUMENT;
    }
    // Padding of a step of static shape shares a slot, of the null block, which nobody reads: order does not matter.
    pool.run_rows(c.tokens, 4 * (c.heads + 2 * c.kv_heads) * c.dim, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) token(c, kernels, t);
    });
    return HP_OK;
}

}  // namespace hotplug
