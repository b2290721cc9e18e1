#!/bin/sh
# Builds llama.cpp's tools for this very processor, to be measured against; options of CMake's can make it another one's:
# usage: [TOOLS='llama-bench ...'] [JOBS=2] build_llama_cpp.sh SOURCE DIRECTORY [-DGGML_NATIVE=OFF -DGGML_AVX2=ON ...]
# Nothing is fetched: the server's page, which would be, is left out.
set -eu
source=$1 directory=$2
shift 2
tools=${TOOLS:-llama-quantize llama-imatrix llama-bench llama-perplexity llama-gguf-split llama-server}
command -v cmake > /dev/null || { echo 'llama.cpp is built with cmake: install it (pip install cmake will do)' >&2; exit 1; }
cmake -S "$source" -B "$directory" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_CCACHE=OFF -DLLAMA_CURL=OFF \
    -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=ON \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF "$@" > "$directory.log" 2>&1 || { cat "$directory.log" >&2; exit 1; }
# shellcheck disable=SC2086  # a list
nice -n 10 cmake --build "$directory" --parallel "${JOBS:-2}" --target $tools >> "$directory.log" 2>&1 ||
    { tail -n 50 "$directory.log" >&2; exit 1; }
