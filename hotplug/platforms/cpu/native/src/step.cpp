// See step.h. Few operations a float, or none: the compiler's baseline will do where RowKernels bring nothing.
#include "step.h"

#include <algorithm>
#include <cstring>

#include "half.h"
#include "kernels.h"
#include "pack.h"

namespace hotplug {
namespace {

float half_at(const uint8_t* bytes) {
    uint16_t half;
    std::memcpy(&half, bytes, 2);
    return half_to_float(half);
}

// Weights first .. first + kGroup of a row, of which `group` is the group that holds them.
void dequantize(int64_t kind, const uint8_t* group, float* out) {
    const float scale = half_at(group);
    if (kind == kQ8_0) {
        for (int64_t i = 0; i < kGroup; ++i) out[i] = static_cast<float>(static_cast<int8_t>(group[2 + i])) * scale;
        return;
    }
    const bool has_min = kind == kQ4_1;
    const uint8_t* quants = group + (has_min ? 4 : 2);
    const int zero = has_min ? 0 : 8;
    const float least = has_min ? half_at(group + 2) : 0.0f;
    for (int64_t i = 0; i < kGroup / 2; ++i) {
        const float low = static_cast<float>((quants[i] & 15) - zero) * scale;
        const float high = static_cast<float>((quants[i] >> 4) - zero) * scale;
        out[i] = has_min ? low + least : low;
        out[kGroup / 2 + i] = has_min ? high + least : high;
    }
}

}  // namespace

int rms_norm(const hp_rms_norm_call& c, const RowKernels& kernels, Pool& pool) {
    if (c.rows < 0 || c.width <= 0) return HP_BAD_ARGUMENT;
    pool.run_rows(c.rows, c.width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* residual = c.residual == nullptr ? nullptr : c.residual + i * c.residual_stride;
            float* sum = c.residual == nullptr ? nullptr : c.sum + i * c.width;
            kernels.rms_norm(c.x + i * c.x_stride, residual, c.weight, c.width, static_cast<float>(c.eps), sum,
                             c.out + i * c.width);
        }
    });
    return HP_OK;
}

int silu_mul(const hp_silu_mul_call& c, const RowKernels& kernels, Pool& pool) {
    if (c.rows < 0 || c.width <= 0) return HP_BAD_ARGUMENT;
    pool.run_rows(c.rows, 4 * c.width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float* gate = c.gate_up + i * c.stride;
            kernels.silu_mul(gate, gate + c.width, c.width, c.out + i * c.width);
        }
    });
    return HP_OK;
}

int embed(const hp_embed_call& c, Pool& pool) {
    const bool grouped = c.kind == kQ4_0 || c.kind == kQ4_1 || c.kind == kQ8_0;
    if (c.tokens < 0 || c.hidden <= 0 || (!grouped && c.kind != 0)) return HP_BAD_ARGUMENT;
    if (grouped && c.hidden % kGroup != 0) return HP_BAD_ARGUMENT;
    for (int64_t t = 0; t < c.tokens; ++t) {
        if (c.token_ids[t] < 0 || c.token_ids[t] >= c.vocab) return HP_BAD_ARGUMENT;
    }
    pool.run_rows(c.tokens, grouped ? 4 * c.hidden : c.hidden, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t* row = static_cast<const uint8_t*>(c.table) + c.token_ids[t] * c.row_bytes;
            float* out = c.out + t * c.hidden;
            if (!grouped) {
                std::memcpy(out, row, static_cast<size_t>(c.hidden) * 4);
                continue;
            }
            const int64_t size = gguf_group_bytes(static_cast<int>(c.kind));
            for (int64_t g = 0; g < c.hidden / kGroup; ++g) dequantize(c.kind, row + g * size, out + g * kGroup);
        }
    });
    return HP_OK;
}

int prepare_step(const hp_prepare_step_call& c) {
    if (c.tokens < 0 || c.requests < 0 || c.block_size <= 0 || c.num_blocks < 0 || c.num_blocks > c.max_blocks) {
        return HP_BAD_ARGUMENT;
    }
    if (c.query_start[0] != 0 || c.query_start[c.requests] != c.tokens) return HP_BAD_ARGUMENT;
    for (int64_t r = 0; r < c.requests; ++r) {
        const int64_t row = c.rows[r], first = c.query_start[r], count = c.query_start[r + 1] - first;
        if (row < 0 || row >= c.batch || count < 0 || first + count > c.tokens) return HP_BAD_ARGUMENT;
        const int64_t begin = c.start[r], length = begin + count;
        if (begin < 0 || (count > 0 && (length - 1) / c.block_size >= c.max_blocks)) return HP_BAD_ARGUMENT;
        const int64_t* blocks = c.block_tables + row * c.table_stride;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t position = begin + i, token = c.token_ids[first + i];
            c.out_tokens[first + i] = token < 0 ? std::max<int64_t>(c.last_tokens[row], 0) : token;
            c.out_positions[first + i] = position;
            c.out_slots[first + i] = blocks[position / c.block_size] * c.block_size + position % c.block_size;
        }
        c.out_seq_lens[r] = length;
        if (c.num_blocks > 0) {
            std::memcpy(c.out_table + r * c.num_blocks, blocks, static_cast<size_t>(c.num_blocks) * 8);
        }
    }
    return HP_OK;
}

}  // namespace hotplug
