// Rows of floats for AVX-512 (F, BW and VL).
#include <immintrin.h>

#include "rows.h"

namespace hotplug {
namespace {

#include "vectors_avx512.h"

#include "exponential.h"

#include "rows_kernels.h"

}  // namespace

const RowKernels kRowsAvx512 = kRows;

}  // namespace hotplug
