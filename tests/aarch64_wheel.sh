#!/bin/sh
# Builds the wheel for Linux on AArch64 and tests it with Debian's Python for it, emulated: sh tests/aarch64_wheel.sh
# It needs Debian, the network, gcc-aarch64-linux-gnu, qemu-user, `dpkg --add-architecture arm64; apt-get update`, and
# a Python 3.11 with numpy, cffi, setuptools and pip as $PYTHON.
set -eu
PYTHON=${PYTHON:-python3}
out=$PWD/build/aarch64
rm -rf "$out"
mkdir -p "$out/debs" "$out/root" "$out/site"

FASTDROP_REQUIRE_EXTENSION=1 CC=aarch64-linux-gnu-gcc LDSHARED="aarch64-linux-gnu-gcc -shared" _PYTHON_HOST_PLATFORM=linux-aarch64 \
    "$PYTHON" setup.py -q build -b "$out/build" bdist_wheel -d "$out/wheels"

cd "$out/debs"
apt-get -qq download python3.11-minimal:arm64 libpython3.11-minimal:arm64 libpython3.11-stdlib:arm64 libc6:arm64 \
    zlib1g:arm64 libexpat1:arm64 libffi8:arm64 libssl3:arm64 libbz2-1.0:arm64 liblzma5:arm64 libuuid1:arm64 \
    libgcc-s1:arm64 libstdc++6:arm64
for package in *.deb; do dpkg-deb -x "$package" "$out/root"; done
cd "$out"
"$PYTHON" -m pip download -q --only-binary :all: --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 --python-version 3.11 --implementation cp numpy cffi -d wheels
for wheel in wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" site; done
FASTDROP_BACKEND=c PYTHONPATH=$out/site qemu-aarch64 -L root root/usr/bin/python3.11 -m fastdrop selftest
