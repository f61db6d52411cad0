// The C interface of the native CPU kernels: plain types only, so that one build serves every Python and every torch.
//
// Products: a weight is packed once (hp_pack) from the groups of a GGUF file and then multiplied (hp_linear). `kind` is the
// number that GGUF gives a tensor's type: 2 = Q4_0, 3 = Q4_1, 8 = Q8_0. Strides count floats. Every call may come from
// any thread; calls wait for each other. Results are float32.
#pragma once

#include <cstdint>

#define HP_API extern "C" __attribute__((visibility("default")))

// Raised when a signature, a packed layout or a meaning below changes; the loader refuses any other number.
constexpr int HP_VERSION = 3;

// What a call returns.
enum hp_status : int {
    HP_OK = 0,
    HP_BAD_ARGUMENT = 1,   // an unknown kind, a size that is no multiple of the group, a negative count
    HP_OUT_OF_MEMORY = 2,  // the workspace could not grow
};

HP_API int hp_version();

// The instruction sets that this build holds and this processor runs, best first, separated by blanks.
HP_API const char* hp_instruction_sets();
// The one in use.
HP_API const char* hp_instruction_set();
// Use another of them, for tests and benchmarks.
HP_API int hp_use_instruction_set(const char* name);

// Threads that take part in a call, the caller among them. Starts the pool if there is none.
HP_API int hp_threads();
// Have `count` threads, at most one a physical core that this process may run on; returns how many there are.
HP_API int hp_set_threads(int count);

// Bytes of a packed weight of `rows` outputs and `cols` inputs, -1 for arguments that hp_pack refuses.
HP_API int64_t hp_packed_bytes(int kind, int64_t rows, int64_t cols);
// Pack the GGUF groups of a weight, `rows` x `cols` row by row, into `packed`. Aligned to 64 bytes it is
// read fastest, as all else it may lie anywhere.
HP_API int hp_pack(int kind, const uint8_t* groups, int64_t rows, int64_t cols, uint8_t* packed);

// What follows are the calls of a step. Each takes one struct, so that it can be kept and made again (hp_replay): lengths,
// positions and token ids are read from the memory that it points to, when it is made.

struct hp_linear_call {
    const uint8_t* packed;
    const float* x;     // [n][cols] by x_stride
    const float* bias;  // [rows] or null
    float* out;         // [n][rows] by out_stride
    int64_t kind, rows, cols, n, x_stride, out_stride;
};
// out = x times the packed weight transposed, plus the bias.
HP_API int hp_linear(const hp_linear_call* call);
// The same with a weight and a bias of 2 * rows outputs of which the first half gates the second:
// out[n][rows] = silu(gate) * up. `rows` is a multiple of 16.
HP_API int hp_linear_silu_mul(const hp_linear_call* call);

struct hp_linear_f32_call {
    const float* w;     // [rows][cols] by w_stride
    const float* x;     // as above
    const float* bias;
    float* out;
    int64_t w_stride, rows, cols, n, x_stride, out_stride;
};
// hp_linear of a float32 weight of any sizes; made for few rows of x.
HP_API int hp_linear_f32(const hp_linear_f32_call* call);

// Paged attention, as `attention` in hotplug/core/ops/attention.py defines it. Everything is on the host; strides count
// elements, and a head's values lie side by side. Requests' lengths are read from here alone.
struct hp_attention_call {
    const float* q;  // [tokens][heads][dim]
    const void* k;   // [num_blocks][block_size][kv_heads][dim] by its strides
    const void* v;
    float* out;                  // [tokens][heads][dim], contiguous; rows of no request become zero
    const int64_t* block_table;  // [requests][table_blocks]
    const int64_t* query_start;  // [requests + 1]
    const int64_t* seq_lens;     // [requests]
    const float* sinks;          // [heads] or null
    int64_t tokens, q_token_stride, q_head_stride;
    int64_t k_block_stride, k_token_stride, k_head_stride;
    int64_t v_block_stride, v_token_stride, v_head_stride;
    int64_t table_stride, table_blocks, requests;
    int64_t heads, kv_heads, dim, num_blocks, block_size;
    int64_t cache_kind;  // 0 = float32, 1 = bfloat16, 2 = float16
    int64_t window;      // positions that a query sees, its own among them; 0 = all
    double scale;
    double soft_cap;  // 0 = none
};
// HP_BAD_ARGUMENT without AVX2, for a dim that is no multiple of 8 or above 256, and for a step that leaves its tensors.
HP_API int hp_attention(const hp_attention_call* call);

// Rotation of queries and keys by halves and the write of keys and values into a paged cache, all float32, as
// `rope_kv_write` in hotplug/core/ops/rope_kv_write.py defines it. Strides as above.
struct hp_rope_kv_write_call {
    const float* q;            // [tokens][heads][dim]
    const float* k;            // [tokens][kv_heads][dim]
    const float* v;            // as k
    const float* cos_sin;      // [max_position][rotary_dim], contiguous: cosines, then sines
    const int64_t* positions;  // [tokens]
    const int64_t* slots;      // [tokens] block * block_size + offset
    float* out;                // [tokens][heads][dim], contiguous: the rotated queries
    float* k_cache;            // [num_blocks][block_size][kv_heads][dim] by its strides
    float* v_cache;
    int64_t tokens, heads, kv_heads, dim, rotary_dim, max_position;
    int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    int64_t k_cache_block_stride, k_cache_token_stride, k_cache_head_stride;
    int64_t v_cache_block_stride, v_cache_token_stride, v_cache_head_stride;
    int64_t num_blocks, block_size;
};
// HP_BAD_ARGUMENT for a position or a slot that there is none of; nothing is written then.
HP_API int hp_rope_kv_write(const hp_rope_kv_write_call* call);

// Calls made one after the other, as their results may be each other's arguments.
struct hp_replay_entry {
    int (*function)(const void* call);  // one of the above
    const void* call;                   // its struct
};
// The status of the first that fails, and then its index in `failed`; no later one is made.
HP_API int hp_replay(const hp_replay_entry* entries, int64_t count, int64_t* failed);
