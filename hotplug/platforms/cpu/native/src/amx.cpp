// See amx.h.
#include "amx.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#if defined(HOTPLUG_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pool.h"

namespace hotplug {

#if defined(HOTPLUG_AMX)
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // the state component of the tile registers

bool usable() {
    unsigned a = 0, b = 0, c = 0, d = 0, saved = 0, high = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & 0x600e6) != 0x600e6) return false;  // vectors, tile configuration and tile data
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool avx512 = (b >> 16 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    const bool amx = (d >> 22 & 1) && (d >> 24 & 1);  // BF16 and TILE
    if (!avx512 || !amx || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512-BF16
    // For all threads of the process, and a forked child's. Refused where a thread's signal stack is too small.
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const TileKernels* amx_tiles() {
    static const bool found = usable();
    return found ? &kAmxTiles : nullptr;
}
#else
const TileKernels* amx_tiles() { return nullptr; }
#endif

namespace {

constexpr int64_t kActivationBytes = 768 << 10;  // that an item goes through for each pair of weight tiles

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The call in items of some row tiles times a pair of weight tiles: two neighbours, or gate and up.
struct Work {
    const TileKernels& kernels;
    const hp_linear_call& call;
    bool gated;
    void (*silu_mul)(const float* gate, const float* up, float* out);
    const uint8_t* activations;

    int64_t groups = call.cols / kGroup;
    int64_t tiles = divide_up(call.rows, kTile);
    int64_t pairs = gated ? tiles : divide_up(tiles, 2);
    int64_t row_tiles = divide_up(call.n, kTileRows);
    int64_t row_tiles_each = 0;

    int64_t items() const { return pairs * divide_up(row_tiles, row_tiles_each); }

    // `weights` is room for a pair of widened tiles.
    void item(int64_t index, uint8_t* weights) const {
        const int64_t pair = index % pairs, first = index / pairs * row_tiles_each;
        const int64_t last = std::min(row_tiles, first + row_tiles_each);
        const int64_t each = gated ? 1 : 2;  // tiles of results
        const int64_t left = pair * each, right = gated ? tiles + pair : left + 1;
        const int outs = right < (gated ? 2 * tiles : tiles) ? 2 : 1;
        const int kind = static_cast<int>(call.kind);
        const int64_t tile_bytes = groups * group_bytes(kind);
        alignas(64) float bias[2 * kTile] = {};
        const int64_t sides[2] = {left, right};
        for (int side = 0; side < outs; ++side) {
            const int64_t column = sides[side] * kTile, all = gated ? 2 * call.rows : call.rows;
            kernels.widen(kind)(call.packed + sides[side] * tile_bytes, groups, weights + side * groups * kTileBytes);
            if (call.bias != nullptr) {
                std::memcpy(bias + side * kTile, call.bias + column,
                            static_cast<size_t>(std::min(kTile, all - column)) * 4);
            }
        }
        const int64_t width = std::min(call.rows - left * kTile, each * kTile);
        for (int64_t tile = first; tile < last; tile += 2) {
            const int rows = tile + 1 < last ? 2 : 1;
            const int64_t row = tile * kTileRows, count = std::min(call.n - row, rows * kTileRows);
            const auto multiply = kernels.multiply[rows - 1][outs - 1];
            const uint8_t* a = activations + tile * groups * kTileBytes;
            float* out = call.out + row * call.out_stride + left * kTile;
            if (!gated && width == outs * kTile && count == rows * kTileRows) {
                multiply(a, weights, groups, bias, out, call.out_stride);
                continue;
            }
            alignas(64) float results[2 * kTileRows * 2 * kTile];
            multiply(a, weights, groups, bias, results, 2 * kTile);
            for (int64_t i = 0; i < count; ++i, out += call.out_stride) {
                const float* from = results + i * 2 * kTile;
                if (gated) {
                    silu_mul(from, from + kTile, out);
                } else {
                    std::memcpy(out, from, static_cast<size_t>(width) * 4);
                }
            }
        }
    }
};

}  // namespace

int linear_many(const TileKernels& kernels, const hp_linear_call& call, bool gated,
                void (*silu_mul)(const float* gate, const float* up, float* out), Pool& pool,
                void* (*allocate)(void* context, size_t bytes), void* context) {
    Work work{kernels, call, gated, silu_mul, nullptr};
    const int64_t threads = pool.threads(), tile_bytes = work.groups * kTileBytes;
    const int64_t wanted = divide_up(4 * threads, work.pairs);  // items of a pair of weight tiles
    const int64_t most = std::max<int64_t>(2, kActivationBytes / tile_bytes);
    work.row_tiles_each = std::min(most, divide_up(divide_up(work.row_tiles, wanted), 2) * 2);
    auto* memory = static_cast<uint8_t*>(
        allocate(context, static_cast<size_t>((work.row_tiles + 2 * threads) * tile_bytes)));
    if (memory == nullptr) return HP_OUT_OF_MEMORY;
    work.activations = memory;
    pool.run(work.row_tiles, [&](int64_t tile) {
        const int64_t row = tile * kTileRows;
        kernels.round(call.x + row * call.x_stride, call.x_stride, std::min(kTileRows, call.n - row), work.groups,
                      memory + tile * tile_bytes);
    });
    // An item of the pool is a thread's place, with memory of its own, that takes items of the call until none is left.
    std::atomic<int64_t> taken{0};
    uint8_t* const weights = memory + work.row_tiles * tile_bytes;
    pool.run(threads, [&](int64_t place) {
        kernels.begin();
        for (int64_t i; (i = taken.fetch_add(1, std::memory_order_relaxed)) < work.items();) {
            work.item(i, weights + 2 * place * tile_bytes);
        }
        kernels.end();
    });
    return HP_OK;
}

}  // namespace hotplug
