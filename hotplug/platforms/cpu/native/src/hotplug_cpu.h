// The C interface of the native CPU kernels: plain types only, so that one build serves every Python and every torch.
//
// Products: a weight is packed once (hp_pack) from the groups of a GGUF file and then multiplied (hp_linear). `kind` is the
// number that GGUF gives a tensor's type: 2 = Q4_0, 3 = Q4_1, 8 = Q8_0. Strides count floats. Every call may come from
// any thread; calls wait for each other. Results are float32.
#pragma once

#include <cstdint>

#define HP_API extern "C" __attribute__((visibility("default")))

// Raised when a signature, a packed layout or a meaning below changes; the loader refuses any other number.
constexpr int HP_VERSION = 4;

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

// Rotation of queries and keys by halves and the write of keys and values into a paged cache, as `rope_kv_write` in
// hotplug/core/ops/rope_kv_write.py defines it; with weights of norms, `qk_norm_rope_kv_write`. Strides as above.
struct hp_rope_kv_write_call {
    const float* q;            // [tokens][heads][dim]
    const float* k;            // [tokens][kv_heads][dim]
    const float* v;            // as k
    const float* cos_sin;      // [max_position][rotary_dim], contiguous: cosines, then sines
    const int64_t* positions;  // [tokens]
    const int64_t* slots;      // [tokens] block * block_size + offset
    const float* q_weight;     // [dim], or null where heads are not normalized
    const float* k_weight;     // as q_weight
    float* out;                // [tokens][heads][dim], contiguous: the rotated queries
    void* k_cache;             // [num_blocks][block_size][kv_heads][dim] by its strides
    void* v_cache;
    int64_t tokens, heads, kv_heads, dim, rotary_dim, max_position;
    int64_t q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride;
    int64_t k_cache_block_stride, k_cache_token_stride, k_cache_head_stride;
    int64_t v_cache_block_stride, v_cache_token_stride, v_cache_head_stride;
    int64_t num_blocks, block_size;
    int64_t cache_kind;  // as of attention; what a narrower one cannot hold becomes its largest value
    double eps;          // of the norms
};
// HP_BAD_ARGUMENT for a position or a slot that there is none of; nothing is written then.
HP_API int hp_rope_kv_write(const hp_rope_kv_write_call* call);

// The small ops of a step, as hotplug/core/ops defines those of their names. What is not said to have a stride is
// contiguous.

struct hp_rms_norm_call {
    const float* x;         // [rows][width]
    const float* residual;  // as x: add_rms_norm; or null
    const float* weight;    // [width]
    float* sum;             // [rows][width] x + residual, where there is one
    float* out;             // [rows][width]
    int64_t rows, width, x_stride, residual_stride;
    double eps;
};
HP_API int hp_rms_norm(const hp_rms_norm_call* call);

struct hp_silu_mul_call {
    const float* gate_up;  // [rows][2 * width]
    float* out;            // [rows][width]
    int64_t rows, width, stride;
};
HP_API int hp_silu_mul(const hp_silu_mul_call* call);

struct hp_embed_call {
    const int64_t* token_ids;  // [tokens]
    const void* table;         // [vocab] rows of floats, or of GGUF groups
    float* out;                // [tokens][hidden]
    int64_t tokens, vocab, hidden;
    int64_t row_bytes;  // from a row of the table to the next
    int64_t kind;       // GGUF's number for the type of the table: 0 = float32, or one that hp_pack takes
};
// HP_BAD_ARGUMENT for a token that there is none of.
HP_API int hp_embed(const hp_embed_call* call);

struct hp_prepare_step_call {
    const int64_t* token_ids;     // [tokens], -1 for the last token of its row
    const int64_t* rows;          // [requests]
    const int64_t* query_start;   // [requests + 1]
    const int64_t* start;         // [requests]
    const int64_t* last_tokens;   // [batch]
    const int64_t* block_tables;  // [batch][max_blocks]
    int64_t* out_tokens;          // [tokens]
    int64_t* out_positions;       // [tokens]
    int64_t* out_slots;           // [tokens]
    int64_t* out_seq_lens;        // [requests]
    int64_t* out_table;           // [requests][num_blocks]
    int64_t tokens, requests, batch, max_blocks, table_stride, block_size;
    int64_t num_blocks;  // at most max_blocks; 0 = prepare_inputs
};
// HP_BAD_ARGUMENT for a row or a block that there is none of, and unless query_start goes from 0 to `tokens`.
HP_API int hp_prepare_step(const hp_prepare_step_call* call);

struct hp_argmax_call {
    const float* logits;  // [rows][vocab]
    int64_t* out;         // [rows]
    int64_t rows, vocab, stride;
};
// HP_BAD_ARGUMENT for an empty vocabulary.
HP_API int hp_argmax(const hp_argmax_call* call);

struct hp_sample_call {
    const float* logits;        // [rows][vocab]
    const int64_t* batch_rows;  // [rows] which entry of the parameters is a row's; null: its own
    const float* temperature;   // [batch]; 0 takes the best token
    const int64_t* top_k;       // [batch] or null, as top_p and min_p
    const float* top_p;
    const float* min_p;
    const int64_t* seeds;     // [batch]
    const int64_t* counters;  // [rows]
    int64_t* out;             // [rows]
    int64_t rows, vocab, stride, batch;
};
// `sample`, or with `batch_rows` `sample_rows`. HP_BAD_ARGUMENT for an entry that there is none of.
HP_API int hp_sample(const hp_sample_call* call);

// Calls made one after the other, as their results may be each other's arguments.
struct hp_replay_entry {
    int (*function)(const void* call);  // one of the above
    const void* call;                   // its struct
};
// The status of the first that fails, and then its index in `failed`; no later one is made.
HP_API int hp_replay(const hp_replay_entry* entries, int64_t count, int64_t* failed);
