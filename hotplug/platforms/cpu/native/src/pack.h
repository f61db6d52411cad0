// GGUF groups into the layout of kernels.h.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hotplug {

// Bytes of one group of 32 in a GGUF file: scale, for Q4_1 also min, and quants.
int64_t gguf_group_bytes(int kind);

// Packs outputs first .. first + 16, of `rows` in all, where they belong in `packed`; those beyond the last are zero.
void pack_tile(int kind, const uint8_t* groups, int64_t first, int64_t rows, int64_t cols, uint8_t* packed);

}  // namespace hotplug
