// Rows of floats for AVX2 with FMA and F16C.
#include <immintrin.h>

#include "rows.h"

namespace hotplug {
namespace {

#include "vectors_avx2.h"

#include "exponential.h"

#include "rows_kernels.h"

}  // namespace

const RowKernels kRowsAvx2 = kRows;

}  // namespace hotplug
