// From scores to tokens: the best of a row, or a draw among what top-k, top-p and min-p leave.
#pragma once

#include "attention.h"
#include "hotplug_cpu.h"
#include "pool.h"
#include "rows.h"

namespace hotplug {

// The calls on `pool`; a status of the C interface each.
int argmax(const hp_argmax_call& call, const RowKernels& kernels, Pool& pool);
int sample(const hp_sample_call& call, const RowKernels& kernels, Pool& pool, Allocate allocate, void* context);

}  // namespace hotplug
