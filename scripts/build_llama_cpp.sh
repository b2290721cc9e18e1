#!/bin/sh
# Builds llama.cpp's tools for this very processor, to be measured against; options of CMake's can make it another one's:
# usage: build_llama_cpp.sh SOURCE DIRECTORY [-DGGML_NATIVE=OFF -DGGML_AVX2=ON ...]
set -eu
source=$1 directory=$2
shift 2
command -v cmake > /dev/null || { echo 'llama.cpp is built with cmake: install it (pip install cmake will do)' >&2; exit 1; }
cmake -S "$source" -B "$directory" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_CCACHE=OFF -DLLAMA_CURL=OFF \
    -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DLLAMA_BUILD_UI=OFF "$@" > "$directory.log" 2>&1 || { cat "$directory.log" >&2; exit 1; }
cmake --build "$directory" --parallel "${JOBS:-2}" --target llama-quantize llama-imatrix llama-bench llama-perplexity \
    llama-gguf-split >> "$directory.log" 2>&1 || { tail -n 50 "$directory.log" >&2; exit 1; }
