#!/bin/sh
# Installs what `make arm` needs beside Python: a C compiler for AArch64, its C library, and qemu for single programs.
set -eu
command -v aarch64-linux-gnu-gcc > /dev/null && command -v qemu-aarch64 > /dev/null && exit 0
if ! command -v apt-get > /dev/null; then
    echo 'make arm needs aarch64-linux-gnu-gcc with its C library and qemu-aarch64, and there is no apt-get here to install them: install them by hand' >&2
    exit 1
fi
as_root=
if [ "$(id -u)" != 0 ]; then
    as_root=sudo
fi
$as_root apt-get update -qq
DEBIAN_FRONTEND=noninteractive
export DEBIAN_FRONTEND
$as_root apt-get install -y -qq --no-install-recommends gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user > /dev/null
