// The C interface: chooses an instruction set, owns the threads and the workspace, divides a product among threads.
#include "hotplug_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <pthread.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "attention.h"
#include "kernels.h"
#include "pack.h"
#include "pool.h"
#include "rope.h"

namespace hotplug {
namespace {

// Best first. What the processor says it has is not enough: the system must save the registers too (XCR0).
std::vector<Kernels> available_kernels() {
    std::vector<Kernels> found;
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    uint32_t saved = 0, leaf1 = 0, leaf7b = 0, leaf7c = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1 = c;
    if (leaf1 >> 27 & 1) asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7b = b, leaf7c = c;
    const bool fma = leaf1 >> 12 & 1, f16c = leaf1 >> 29 & 1;
    const bool avx2 = (saved & 0x6) == 0x6 && fma && f16c && (leaf7b >> 5 & 1);
    const bool avx512 = (saved & 0xe6) == 0xe6 && (leaf7b >> 16 & 1) && (leaf7b >> 30 & 1) && (leaf7b >> 31 & 1);
    if (avx2 && avx512 && (leaf7c >> 11 & 1)) {  // F, BW, VL and VNNI
        Kernels mixed = kAvx512Vnni;
        mixed.quantize = kAvx2.quantize;
        mixed.silu_mul = kAvx2.silu_mul;
        mixed.linear_f32 = kAvx2.linear_f32;
        found.push_back(mixed);
    }
    if (avx2) found.push_back(kAvx2);
#endif
    found.push_back(kPortable);
    return found;
}

// Aligned memory that grows and is kept.
class Buffer {
public:
    // At least `bytes`, aligned to 64; null if there is no memory. What it held is lost.
    void* get(size_t bytes) {
        if (bytes > size_) {
            data_.reset();
            size_ = 0;
            const size_t whole = (bytes + 63) / 64 * 64;
            data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, whole)));
            if (data_ != nullptr) size_ = whole;
        }
        return data_.get();
    }

private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    size_t size_ = 0;
};

// All state of the library. Calls hold the mutex, so that they share threads and workspace one after the other. Never
// destroyed: threads may still look at it while the process ends.
struct State {
    std::mutex mutex;
    std::vector<Kernels> available = available_kernels();
    Kernels kernels = available.front();
    std::string names;
    std::unique_ptr<Pool> pool;
    Buffer workspace;

    Pool& threads() {
        if (!pool) pool = std::make_unique<Pool>(Pool::cores());
        return *pool;
    }
};

State& state() {
    static State* const instance = [] {
        State* made = new State;
        for (const Kernels& k : made->available) made->names += (made->names.empty() ? "" : " ") + std::string(k.name);
        // A fork copies this thread alone: it waits for calls of others, and the child starts threads of its own when
        // it needs them. What the lost ones left is given up, because nobody could join them.
        pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                       [] {
                           static_cast<void>(state().pool.release());
                           state().mutex.unlock();
                       });
        return made;
    }();
    return *instance;
}

bool known(int64_t kind) { return kind == kQ4_0 || kind == kQ4_1 || kind == kQ8_0; }

bool valid(int64_t kind, int64_t rows, int64_t cols) { return known(kind) && rows > 0 && cols > 0 && cols % kGroup == 0; }

constexpr int64_t kMaxRows = 128;              // activation rows of an item, what its buffers hold
constexpr int64_t kCachedActivations = 1 << 17;  // bytes of activations that an item goes through for each tile

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a product is divided: items of some activation rows times some tiles.
struct Grid {
    int64_t n, tiles, rows_each, tiles_each;

    Grid(int64_t n, int64_t tiles, int64_t cols, int threads) : n(n), tiles(tiles) {
        rows_each = std::clamp(kCachedActivations / cols / 8 * 8, int64_t{16}, kMaxRows);
        rows_each = std::min(rows_each, n);
        const int64_t blocks = divide_up(n, rows_each);
        const int64_t wanted = std::max<int64_t>(1, divide_up(4 * threads, blocks));  // items of a block of rows
        tiles_each = divide_up(tiles, std::min(wanted, tiles));
    }

    int64_t across() const { return divide_up(tiles, tiles_each); }
    int64_t items() const { return divide_up(n, rows_each) * across(); }
};

// Activations in the workspace, quantized by all threads if there are many.
bool quantize(State& s, const float* x, int64_t n, int64_t x_stride, int64_t cols, int64_t kind,
              Activations& result) {
    const int64_t groups = cols / kGroup, total = n * groups;
    auto* memory = static_cast<uint8_t*>(s.workspace.get(static_cast<size_t>(total) * (kGroup + 12)));
    if (memory == nullptr) return false;
    auto* q = reinterpret_cast<int8_t*>(memory);
    auto* scale = reinterpret_cast<float*>(memory + total * kGroup);
    auto* sum = scale + total;
    auto* offset = reinterpret_cast<int32_t*>(sum + total);
    const int32_t zero_point = s.kernels.zero_point(static_cast<int>(kind));
    Pool& pool = s.threads();
    const int64_t each = n * cols < 16384 ? n : std::max<int64_t>(1, n / (4 * pool.threads()));
    pool.run(divide_up(n, each), [&](int64_t item) {
        for (int64_t i = item * each; i < std::min(n, (item + 1) * each); ++i) {
            const int64_t at = i * groups;
            s.kernels.quantize(x + i * x_stride, groups, zero_point, q + at * kGroup, scale + at, sum + at,
                               offset + at);
        }
    });
    result = {q, scale, sum, offset, groups};
    return true;
}

// The bias of a tile, 16 floats whatever there is.
void tile_bias(const float* bias, int64_t first, int64_t rows, float* out) {
    for (int64_t r = 0; r < kTile; ++r) out[r] = bias != nullptr && first + r < rows ? bias[first + r] : 0.0f;
}

void linear_item(const State& s, const Grid& grid, int64_t item, const hp_linear_call& call, const Activations& x) {
    const int kind = static_cast<int>(call.kind);
    const int64_t rows = call.rows, out_stride = call.out_stride;
    const int64_t begin = item / grid.across() * grid.rows_each, count = std::min(grid.rows_each, grid.n - begin);
    const int64_t first = item % grid.across() * grid.tiles_each, last = std::min(first + grid.tiles_each, grid.tiles);
    const int64_t tile_bytes = x.groups * group_bytes(kind);
    alignas(64) float offsets[kTile];
    for (int64_t t = first; t < last; ++t) {
        tile_bias(call.bias, t * kTile, rows, offsets);
        float* target = call.out + begin * out_stride + t * kTile;
        if ((t + 1) * kTile <= rows) {
            s.kernels.tile(kind)(call.packed + t * tile_bytes, x, begin, count, offsets, target, out_stride);
            continue;
        }
        alignas(64) float padded[kMaxRows * kTile];
        s.kernels.tile(kind)(call.packed + t * tile_bytes, x, begin, count, offsets, padded, kTile);
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(target + i * out_stride, padded + i * kTile, static_cast<size_t>(rows - t * kTile) * 4);
        }
    }
}

void gated_item(const State& s, const Grid& grid, int64_t item, const hp_linear_call& call, const Activations& x) {
    const int kind = static_cast<int>(call.kind);
    const int64_t width = call.rows;
    const int64_t begin = item / grid.across() * grid.rows_each, count = std::min(grid.rows_each, grid.n - begin);
    const int64_t first = item % grid.across() * grid.tiles_each, last = std::min(first + grid.tiles_each, grid.tiles);
    const int64_t tile_bytes = x.groups * group_bytes(kind);
    alignas(64) float offsets[kTile], gate[kMaxRows * kTile], up[kMaxRows * kTile];
    for (int64_t t = first; t < last; ++t) {
        tile_bias(call.bias, t * kTile, 2 * width, offsets);
        s.kernels.tile(kind)(call.packed + t * tile_bytes, x, begin, count, offsets, gate, kTile);
        tile_bias(call.bias, width + t * kTile, 2 * width, offsets);
        s.kernels.tile(kind)(call.packed + (grid.tiles + t) * tile_bytes, x, begin, count, offsets, up, kTile);
        for (int64_t i = 0; i < count; ++i) {
            s.kernels.silu_mul(gate + i * kTile, up + i * kTile,
                               call.out + (begin + i) * call.out_stride + t * kTile);
        }
    }
}

}  // namespace
}  // namespace hotplug

using namespace hotplug;

int hp_version() { return HP_VERSION; }

const char* hp_instruction_sets() { return state().names.c_str(); }

const char* hp_instruction_set() {
    const std::lock_guard lock(state().mutex);
    return state().kernels.name;
}

int hp_use_instruction_set(const char* name) {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    for (const Kernels& k : s.available) {
        if (std::strcmp(k.name, name) == 0) {
            s.kernels = k;
            return HP_OK;
        }
    }
    return HP_BAD_ARGUMENT;
}

int hp_threads() {
    const std::lock_guard lock(state().mutex);
    return state().threads().threads();
}

int hp_set_threads(int count) {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    s.pool.reset();
    s.pool = std::make_unique<Pool>(count);
    return s.pool->threads();
}

int64_t hp_packed_bytes(int kind, int64_t rows, int64_t cols) {
    return valid(kind, rows, cols) ? divide_up(rows, kTile) * (cols / kGroup) * group_bytes(kind) : -1;
}

int hp_pack(int kind, const uint8_t* groups, int64_t rows, int64_t cols, uint8_t* packed) {
    if (!valid(kind, rows, cols)) return HP_BAD_ARGUMENT;
    State& s = state();
    const std::lock_guard lock(s.mutex);
    const int64_t tiles = divide_up(rows, kTile), each = divide_up(tiles, 4 * s.threads().threads());
    s.threads().run(divide_up(tiles, each), [&](int64_t item) {
        for (int64_t t = item * each; t < std::min(tiles, (item + 1) * each); ++t) {
            pack_tile(kind, groups, t * kTile, rows, cols, packed);
        }
    });
    return HP_OK;
}

int hp_linear(const hp_linear_call* call) {
    const auto& [packed, x, bias, out, kind, rows, cols, n, x_stride, out_stride] = *call;
    if (!valid(kind, rows, cols) || n < 0) return HP_BAD_ARGUMENT;
    if (n == 0) return HP_OK;
    State& s = state();
    const std::lock_guard lock(s.mutex);
    Activations a;
    if (!quantize(s, x, n, x_stride, cols, kind, a)) return HP_OUT_OF_MEMORY;
    const Grid grid(n, divide_up(rows, kTile), cols, s.threads().threads());
    s.threads().run(grid.items(), [&](int64_t item) { linear_item(s, grid, item, *call, a); });
    return HP_OK;
}

int hp_linear_silu_mul(const hp_linear_call* call) {
    const auto& [packed, x, bias, out, kind, width, cols, n, x_stride, out_stride] = *call;
    if (!valid(kind, width, cols) || width % kTile != 0 || n < 0) return HP_BAD_ARGUMENT;
    if (n == 0) return HP_OK;
    State& s = state();
    const std::lock_guard lock(s.mutex);
    Activations a;
    if (!quantize(s, x, n, x_stride, cols, kind, a)) return HP_OUT_OF_MEMORY;
    const Grid grid(n, width / kTile, cols, s.threads().threads());
    s.threads().run(grid.items(), [&](int64_t item) { gated_item(s, grid, item, *call, a); });
    return HP_OK;
}

int hp_linear_f32(const hp_linear_f32_call* call) {
    const auto& [w, x, bias, out, w_stride, rows, cols, n, x_stride, out_stride] = *call;
    if (rows <= 0 || cols <= 0 || n < 0) return HP_BAD_ARGUMENT;
    if (n == 0) return HP_OK;
    State& s = state();
    const std::lock_guard lock(s.mutex);
    const int64_t each = std::max<int64_t>(4, divide_up(divide_up(rows, 4 * s.threads().threads()), 4) * 4);
    s.threads().run(divide_up(rows, each), [&](int64_t item) {
        s.kernels.linear_f32(call->w, call->w_stride, item * each, std::min(call->rows, (item + 1) * each), call->cols,
                             call->x, call->n, call->x_stride, call->bias, call->out, call->out_stride);
    });
    return HP_OK;
}

int hp_attention(const hp_attention_call* call) {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    const AttentionKernels* kernels = nullptr;
#if defined(__x86_64__)
    if (std::strcmp(s.kernels.name, kAvx2.name) == 0) kernels = &kAttentionAvx2;
    if (std::strcmp(s.kernels.name, kAvx512Vnni.name) == 0) {
        kernels = call->dim % kAttentionAvx512.lanes == 0 ? &kAttentionAvx512 : &kAttentionAvx2;
    }
#endif
    if (kernels == nullptr) return HP_BAD_ARGUMENT;
    const Allocate allocate = [](void* buffer, size_t bytes) { return static_cast<Buffer*>(buffer)->get(bytes); };
    return attention(*call, *kernels, s.threads(), allocate, &s.workspace);
}

int hp_rope_kv_write(const hp_rope_kv_write_call* call) {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    return rope_kv_write(*call, s.threads());
}

int hp_replay(const hp_replay_entry* entries, int64_t count, int64_t* failed) {
    for (int64_t i = 0; i < count; ++i) {
        if (const int status = entries[i].function(entries[i].call)) {
            *failed = i;
            return status;
        }
    }
    return HP_OK;
}
