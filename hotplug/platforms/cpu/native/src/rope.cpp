// Rotation and cache write, a token at a time: few operations a float, so that the compiler's baseline will do.
#include "rope.h"

#include <algorithm>
#include <cstring>

namespace hotplug {
namespace {

constexpr int64_t kTokens = 16;  // of an item; fewer are not worth waking a thread for

// `to` = `from` [dim] with its first 2 * half values rotated.
void rotate(const float* from, const float* cos, const float* sin, int64_t half, int64_t dim, float* __restrict to) {
    for (int64_t d = 0; d < half; ++d) {
        const float first = from[d], second = from[half + d];
        to[d] = first * cos[d] - second * sin[d];
        to[half + d] = second * cos[d] + first * sin[d];
    }
    std::memcpy(to + 2 * half, from + 2 * half, static_cast<size_t>(dim - 2 * half) * 4);
}

void token(const hp_rope_kv_write_call& c, int64_t t) {
    const int64_t half = c.rotary_dim / 2, block = c.slots[t] / c.block_size, inside = c.slots[t] % c.block_size;
    const float* cos = c.cos_sin + c.positions[t] * c.rotary_dim;
    for (int64_t h = 0; h < c.heads; ++h) {
        const float* q = c.q + t * c.q_token_stride + h * c.q_head_stride;
        rotate(q, cos, cos + half, half, c.dim, c.out + (t * c.heads + h) * c.dim);
    }
    float* keys = c.k_cache + block * c.k_cache_block_stride + inside * c.k_cache_token_stride;
    float* values = c.v_cache + block * c.v_cache_block_stride + inside * c.v_cache_token_stride;
    for (int64_t h = 0; h < c.kv_heads; ++h) {
        const float* k = c.k + t * c.k_token_stride + h * c.k_head_stride;
        rotate(k, cos, cos + half, half, c.dim, keys + h * c.k_cache_head_stride);
        std::memcpy(values + h * c.v_cache_head_stride, c.v + t * c.v_token_stride + h * c.v_head_stride,
                    static_cast<size_t>(c.dim) * 4);
    }
}

}  // namespace

int rope_kv_write(const hp_rope_kv_write_call& c, Pool& pool) {
    if (c.rotary_dim < 0 || c.rotary_dim % 2 != 0 || c.rotary_dim > c.dim || c.block_size <= 0) return HP_BAD_ARGUMENT;
    for (int64_t t = 0; t < c.tokens; ++t) {
        if (c.positions[t] < 0 || c.positions[t] >= c.max_position) return HP_BAD_ARGUMENT;
        if (c.slots[t] < 0 || c.slots[t] >= c.num_blocks * c.block_size) return HP_BAD_ARGUMENT;
    }
    // Padding of a step of static shape shares a slot, of the null block, which nobody reads: order does not matter.
    pool.run((c.tokens + kTokens - 1) / kTokens, [&](int64_t item) {
        for (int64_t t = item * kTokens; t < std::min(c.tokens, (item + 1) * kTokens); ++t) token(c, t);
    });
    return HP_OK;
}

}  // namespace hotplug
