#!/bin/sh
# Unpacks llama.cpp's sources, as llama-cpp-python ships them, for the sake of its converter.
# usage: fetch_llama_cpp.sh PYTHON REQUIREMENT DIRECTORY
set -eu
python=$1 requirement=$2 directory=$3
if [ -e "$directory" ]; then
    echo "$directory exists and holds no convert_hf_to_gguf.py: remove it, or set LLAMA_CPP_SOURCE" >&2
    exit 1
fi
mkdir -p "$(dirname "$directory")"
work=$(mktemp -d "$directory.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --no-binary llama-cpp-python \
    --dest "$work" "$requirement"
tar -xzf "$work"/*.tar.gz -C "$work"
mv "$work"/llama_cpp_python-*/vendor/llama.cpp "$directory"
