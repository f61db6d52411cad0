#!/usr/bin/env bash
# Runs the kernels' tests under compute-sanitizer on the GPU machine: out-of-bounds and misaligned accesses fail.
# TOOL=racecheck (or synccheck, initcheck) takes another of its tools; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1 || true)
if [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not here: it comes with the CUDA toolkit" >&2
    exit 2
fi
unset TRITON_INTERPRET
# Each tensor an allocation of its own: in PyTorch's pool an access beyond one would land in its neighbour, unseen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
exec "$sanitizer" --tool "${TOOL:-memcheck}" --error-exitcode 1 --report-api-errors no --print-limit 20 \
    "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider tests/test_cuda_kernels.py \
    -k "(equals_its_reference and bfloat16 or cells_past) and not whole" "$@"
