// What an instruction set has to bring: one table of functions, each of them single-threaded, over the packed layout.
//
// The packed layout. Outputs are taken 16 at a time, a tile; the last tile is padded with outputs of scale zero. Tiles
// follow each other, and in a tile its groups of 32 inputs. A group of a tile is, without gaps:
//
//   scales   16 x float16                 one an output
//   mins     16 x float16                 Q4_1 only
//   lines    Q4_0, Q4_1: 4 x 64 bytes     byte 4 r + j of line l holds output r's inputs 4 l + j (low four bits) and
//                                         16 + 4 l + j (high four bits)
//            Q8_0:       8 x 64 bytes     byte 4 r + j of line l holds output r's input 4 l + j, signed
//
// 288, 320 and 544 bytes. Values are the file's own: Q4_0 means scale (q - 8), Q4_1 scale q + min, Q8_0 scale q. A
// 256-bit register thus holds four inputs of eight outputs, which is what a dot product of bytes wants, and four bytes
// of activations broadcast to it serve them all.
//
// The files of an instruction set are compiled for it, so nothing in them may be shared with others by the linker:
// everything in them, and every template here, has internal linkage, and they include no C++ standard library header
// with inline functions.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "rows.h"

namespace hotplug {

constexpr int kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8;  // GGUF's numbers
constexpr int64_t kGroup = 32;                  // inputs that share a scale
constexpr int64_t kTile = 16;                   // outputs that are interleaved

constexpr int64_t kScaleBytes = kTile * 2;

constexpr int64_t quants_offset(int kind) { return kind == kQ4_1 ? 2 * kScaleBytes : kScaleBytes; }

constexpr int64_t group_bytes(int kind) { return quants_offset(kind) + kTile * (kind == kQ8_0 ? kGroup : kGroup / 2); }

// Asks for `bytes` that lie after `p`: far ahead for the second level of the cache, nearer for the first. Without it a
// core reads weights slower, because the processor's own prefetcher starts anew at each page, and with the first level
// alone there is not room enough to remember all that has been asked for. What lies beyond the end is asked for in vain.
constexpr int64_t kFarAhead = 3072, kAhead = 1024;

static inline void prefetch(const void* p, int64_t bytes) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(p);
    for (int64_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(from + kFarAhead + i), 0, 2);
        __builtin_prefetch(reinterpret_cast<const void*>(from + kAhead + i));
    }
}

// The tile after the one at hand, asked for while that one is multiplied with all rows but the first.
struct Next {
    const uint8_t *at, *end;
    int64_t bytes;  // at a time

    // `tile` is the one at hand; there are `times` to ask.
    Next(const uint8_t* tile, int64_t tile_bytes, int64_t times)
        : at(tile + tile_bytes), end(at + tile_bytes), bytes(times > 0 ? (tile_bytes / 64 / times + 1) * 64 : 0) {}

    void ask() {
        if (at >= end) return;
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
        at += bytes;
    }
};

// Activations as the kernels read them: int8 by group of a row, x = scale q.
struct Activations {
    const int8_t* q;        // [n][32 groups], -127..127
    const float* scale;     // [n][groups]; NaN where the group holds a value that is not finite
    const float* sum;       // [n][groups] scale times the sum of q, which mins are multiplied with
    const int32_t* offset;  // [n][groups] minus the zero point times the sum of q
    int64_t groups;
};

struct TileKernels;  // amx.h

struct Kernels {
    const char* name;

    // One row of activations. A group whose largest magnitude is below 2^-118 becomes zero. `zero_point` is that of
    // the tile function that will read the row.
    void (*quantize)(const float* x, int64_t groups, int32_t zero_point, int8_t* q, float* scale, float* sum,
                     int32_t* offset);

    // out[i][16] of one tile for activation rows first .. first + count; `bias` is 16 floats.
    using TileFn = void(const uint8_t* tile, const Activations& x, int64_t first, int64_t count, const float* bias,
                        float* out, int64_t out_stride);
    TileFn* q4_0;
    TileFn* q4_1;
    TileFn* q8_0;

    // out[i] = silu(gate[i]) * up[i] for i < 16.
    void (*silu_mul)(const float* gate, const float* up, float* out);

    // out[i][o] = sum of w[o] x[i] plus bias[o], for rows begin <= o < end of w, i < n.
    void (*linear_f32)(const float* w, int64_t w_stride, int64_t begin, int64_t end, int64_t cols, const float* x,
                       int64_t n, int64_t x_stride, const float* bias, float* out, int64_t out_stride);

    // What the unsigned bytes that q8_0 multiplies with exceed the weights by, if it does not take signed ones.
    int32_t q8_0_zero_point;

    const RowKernels* rows;

    // For products of many rows, if there are any.
    const TileKernels* many = nullptr;

    TileFn* tile(int kind) const { return kind == kQ4_0 ? q4_0 : kind == kQ4_1 ? q4_1 : q8_0; }
    int32_t zero_point(int kind) const { return kind == kQ4_0 ? 8 : kind == kQ4_1 ? 0 : q8_0_zero_point; }
};

extern const Kernels kPortable;
extern const Kernels kAvx2;
extern const Kernels kAvx512Vnni;

}  // namespace hotplug
