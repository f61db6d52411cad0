// Rows of floats for any processor, in plain C++.
#include "rows.h"

namespace hotplug {
namespace {

#include "vectors_portable.h"

#include "exponential.h"

#include "rows_kernels.h"

}  // namespace

const RowKernels kRowsPortable = kRows;

}  // namespace hotplug
