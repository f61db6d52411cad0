// Rotary position embedding and the write into a paged cache.
#pragma once

#include "hotplug_cpu.h"
#include "pool.h"
#include "rows.h"

namespace hotplug {

// The call on `pool`; a status of the C interface.
int rope_kv_write(const hp_rope_kv_write_call& call, const RowKernels& kernels, Pool& pool);

}  // namespace hotplug
