#!/bin/sh
# The wheel, which is built from the sdist, is installed in clean environments and self-tested there, outside the
# checkout: with the newest NumPy and with NumPy 1.26. So is the sdist, without a compiler; its tests can be collected.
# PYTHON is an interpreter that has the packages of requirements-dev.txt.
set -eu

checkout=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

installer=$PYTHON  # `PYTHON` changes below

step() { echo "== package: $*"; }

environment() { # environment NAME PACKAGE...: a clean one at $work/NAME
    name=$1
    shift
    "$PYTHON" -m venv --without-pip "$work/$name"  # pip of PYTHON installs there: another takes seconds to unpack
    "$installer" -m pip --python "$work/$name/bin/python" install --quiet --disable-pip-version-check --no-compile "$@"
}

# Built with setuptools and cffi of PYTHON. The install of the sdist, below, shows that pyproject.toml asks for them.
step "building sdist and wheel"
"$PYTHON" -m build --no-isolation --outdir "$work/dist" "$checkout" > "$work/build.log" 2>&1 \
    || { tail -n 40 "$work/build.log"; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
sdist=$(ls "$work"/dist/*.tar.gz)
case $wheel in
*-cp311-abi3-*) echo "built $(basename "$wheel") and $(basename "$sdist")" ;;
*) echo "the wheel's tag should be cp311-abi3, but is $(basename "$wheel")" && exit 1 ;;
esac
"$PYTHON" -m zipfile -l "$wheel" > "$work/contents"
grep -q '_native.abi3.so' "$work/contents" || { echo "the wheel lacks the C extension" && exit 1; }

cd "$work"

# A helper that the sdist lacks makes an error when the tests are collected: all are, in one process, and few run.
step "the sdist's tests"
mkdir sdist
tar -xzf "$sdist" -C sdist --strip-components 1
"$PYTHON" -m zipfile -e "$wheel" unpacked
cp unpacked/fastdrop/_native.abi3.so sdist/fastdrop
(cd sdist && PYTHONPATH=$PWD "$PYTHON" -m pytest -q -W ignore -p no:cacheprovider tests \
    -k "test_random.py or test_grid.py")

step "wheel, newest NumPy"
environment wheel "$wheel"
"$work/wheel/bin/fastdrop" selftest

step "wheel, NumPy 1.26"
environment numpy1 "$wheel" 'numpy==1.26.4'
"$work/numpy1/bin/python" -m fastdrop selftest

step "sdist, no compiler"
CC=/bin/false environment nocompiler "$sdist"
"$work/nocompiler/bin/fastdrop" info
FASTDROP_BACKEND=auto "$work/nocompiler/bin/fastdrop" selftest
if "$work/nocompiler/bin/python" -c 'import fastdrop._native' 2> "$work/import.log"; then
    echo "an install without a compiler should have no C extension" && exit 1
fi

for version in 3.12 3.13 3.14; do
    if interpreter=$(command -v "python$version") && "$interpreter" -c '' 2> "$work/import.log"; then
        step "the same wheel on Python $version"
        PYTHON=$interpreter environment "python$version" "$wheel"
        "$work/python$version/bin/fastdrop" selftest
    else
        step "Python $version: skipped, not installed"
    fi
done
step "passed"
