// Paged attention: what a call is divided into, and what an instruction set brings for it.
//
// Rows are pairs of a query and a head that share keys and values, so that these are read once for all heads of a
// group. An item is some rows over some keys: it takes the keys in tiles and keeps a running softmax (Milakov and
// Gimelshein, 2018; Dao et al., 2022). Where a step has few rows and long contexts its keys are split, and the parts
// merged by their largest scores and sums.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "hotplug_cpu.h"
#include "rows.h"

namespace hotplug {

using AttentionCall = hp_attention_call;

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxAttentionRows = 96;

// Rows of one request and one head of keys, row by row: all `heads` of a query follow each other.
struct AttentionRows {
    int64_t request;
    int64_t kv_head;
    int64_t first_head;   // of queries, among all
    int64_t heads;        // of the group, at most kMaxAttentionRows
    int64_t first_query;  // token of the step
    int64_t queries;
    int64_t position;  // of the first query in its sequence
    int64_t begin, end;  // keys that any of them sees

    int64_t rows() const { return heads * queries; }
};

// A part of the keys as it is before the division by the sum.
struct AttentionPart {
    float* mixed;  // [rows][dim]
    float* top;    // [rows] the largest score
    float* sum;    // [rows] of the exponentials of scores less `top`
};

struct AttentionKernels {
    // Keys begin <= key < end of some rows, to the output if `part` is null.
    void (*attend)(const AttentionCall& call, const AttentionRows& rows, int64_t begin, int64_t end,
                   const AttentionPart* part);
    // All parts of some rows to the output.
    void (*merge)(const AttentionCall& call, const AttentionRows& rows, const AttentionPart* parts, int64_t count);
    int64_t lanes;  // head dims are multiples of it
    int64_t rows;   // of a prompt chunk that are best taken together, at most kMaxAttentionRows
};

extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
extern const AttentionKernels kAttentionAmx;  // only where amx_tiles() is not null

class Pool;

// Memory that a call needs, all of it or null.
using Allocate = void* (*)(void* context, size_t bytes);

// The call on `pool`; a status of the C interface.
int attention(const AttentionCall& call, const AttentionKernels& kernels, Pool& pool, Allocate allocate, void* context);

}  // namespace hotplug
