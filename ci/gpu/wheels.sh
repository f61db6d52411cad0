#!/bin/sh
# Fetch what a GPU machine without a network lacks, as wheels for Python 3.12, into .whl/ (ignored by git). Arguments
# are packages to fetch besides. FlashInfer, 11 MB, does without the other packages that it names:
#   ci/gpu/wheels.sh flashinfer-python==0.6.1 apache-tvm-ffi==0.1.15.post2
set -eu
cd "$(dirname "$0")/../.."
mkdir -p .whl
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_26_x86_64 --platform manylinux1_x86_64 -d .whl "$@" \
    msgspec==0.22.0 gguf==0.19.0 pyzmq==27.3.0 typer==0.29.2 shellingham prometheus-client==0.26.0 \
    fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 httptools==0.9.0 uvloop==0.22.1 annotated-types typing-inspection \
    httpx2==2.16.2 httpcore2==2.16.2 truststore huggingface_hub==2.4.0 transformers==5.23.0 tokenizers==0.23.3 \
    nvidia-ml-py==13.615.71 \
    prompt_toolkit==3.0.53 wcwidth pydantic==2.14.3 pydantic-core==2.50.4 annotated-doc==0.0.7 opentelemetry-api==1.45.2
ls .whl
