// Products of many rows with AMX: whether the processor has it, what it computes, and the division among threads.
//
// Weights become bfloat16 as they are used, some outputs at a time, and activations once a call; sums are float32. A
// result depends on its own row and output alone, not on how many rows there are or how they are divided.
#pragma once

#include "hotplug_cpu.h"
#include "kernels.h"

namespace hotplug {

constexpr int64_t kTileRows = 16;     // activation rows of a tile
constexpr int64_t kTileBytes = 1024;  // of a tile: 16 lines of 32 bfloat16

// What kernels_amx.cpp holds. A thread calls `begin` before it multiplies and `end` after that.
struct TileKernels {
    void (*begin)();
    void (*end)();

    // `count` rows, at most 16, to [groups] tiles, with rows of zeros for those that lack.
    void (*round)(const float* x, int64_t x_stride, int64_t count, int64_t groups, uint8_t* out);

    // 16 packed outputs to [groups] tiles.
    using WidenFn = void(const uint8_t* tile, int64_t groups, uint8_t* out);
    WidenFn* q4_0;
    WidenFn* q4_1;
    WidenFn* q8_0;

    // One or two times 16 rows (the first index, less one) and outputs (the second), whose tiles follow each other:
    // `bias` is [outputs], all of `out` is written.
    void (*multiply[2][2])(const uint8_t* a, const uint8_t* b, int64_t groups, const float* bias, float* out,
                           int64_t out_stride);

    WidenFn* widen(int kind) const { return kind == kQ4_0 ? q4_0 : kind == kQ4_1 ? q4_1 : q8_0; }
};

extern const TileKernels kAmxTiles;

// Null where the build, the processor or the system has no AMX. Asks the system for the registers when first called.
const TileKernels* amx_tiles();

class Pool;

// hp_linear, or hp_linear_silu_mul if `gated`, of a call whose arguments are right. A status of the C interface.
int linear_many(const TileKernels& kernels, const hp_linear_call& call, bool gated,
                void (*silu_mul)(const float* gate, const float* up, float* out), Pool& pool,
                void* (*allocate)(void* context, size_t bytes), void* context);

}  // namespace hotplug
