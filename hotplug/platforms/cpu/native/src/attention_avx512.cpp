// Attention for AVX-512 (F, BW and VL).
#include <immintrin.h>

#include "attention.h"

namespace hotplug {
namespace {

#include "vectors_avx512.h"

constexpr int kColumns = 4;

#include "exponential.h"

#include "attention_heads.h"
#include "attention_tiles.h"

}  // namespace

const AttentionKernels kAttentionAvx512 = {attend, merge, kLanes, 48};

}  // namespace hotplug
