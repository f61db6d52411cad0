// GGUF groups into the layout of kernels.h. A tile at a time, by any thread.
#include "pack.h"

#include <cstring>

namespace hotplug {

int64_t gguf_group_bytes(int kind) { return kind == kQ8_0 ? 34 : kind == kQ4_1 ? 20 : 18; }

void pack_tile(int kind, const uint8_t* groups, int64_t first, int64_t rows, int64_t cols, uint8_t* packed) {
    const int64_t source = gguf_group_bytes(kind), target = group_bytes(kind), per_row = cols / kGroup;
    const int64_t header = kind == kQ4_1 ? 4 : 2;  // scale and min of a group, then its quants
    const int lines = kind == kQ8_0 ? 8 : 4;
    uint8_t* tile = packed + first / kTile * per_row * target;
    if (first + kTile > rows) std::memset(tile, 0, static_cast<size_t>(per_row * target));
    for (int64_t r = 0; r < kTile && first + r < rows; ++r) {
        const uint8_t* from = groups + (first + r) * per_row * source;
        uint8_t* to = tile;
        for (int64_t g = 0; g < per_row; ++g, from += source, to += target) {
            std::memcpy(to + 2 * r, from, 2);
            if (kind == kQ4_1) std::memcpy(to + kScaleBytes + 2 * r, from + 2, 2);
            for (int l = 0; l < lines; ++l) {
                std::memcpy(to + quants_offset(kind) + 64 * l + 4 * r, from + header + 4 * l, 4);
            }
        }
    }
}

}  // namespace hotplug
