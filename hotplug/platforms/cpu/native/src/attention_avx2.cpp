// Attention for AVX2 with FMA and F16C.
#include <immintrin.h>

#include "attention.h"

namespace hotplug {
namespace {

#include "vectors_avx2.h"

constexpr int kColumns = 2;

#include "exponential.h"

#include "attention_heads.h"
#include "attention_tiles.h"

}  // namespace

const AttentionKernels kAttentionAvx2 = {attend, merge, kLanes, 48};

}  // namespace hotplug
