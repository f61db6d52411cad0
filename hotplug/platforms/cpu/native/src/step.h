// The small ops of a step: norms, gates, embeddings and the preparation of its inputs.
#pragma once

#include "hotplug_cpu.h"
#include "pool.h"
#include "rows.h"

namespace hotplug {

// The calls on `pool`; a status of the C interface each.
int rms_norm(const hp_rms_norm_call& call, const RowKernels& kernels, Pool& pool);
int silu_mul(const hp_silu_mul_call& call, const RowKernels& kernels, Pool& pool);
int embed(const hp_embed_call& call, Pool& pool);
int prepare_step(const hp_prepare_step_call& call);

}  // namespace hotplug
