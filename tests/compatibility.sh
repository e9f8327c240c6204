#!/bin/sh
# Whether a wheel works with an interpreter and a NumPy, and with a torch or a Numba if they are asked for:
#
#     sh tests/compatibility.sh WHEEL PYTHON [PACKAGE...]
#     sh tests/compatibility.sh dist/*.whl python3.12 numpy==1.26.4
#     sh tests/compatibility.sh dist/*.whl python3.11 torch==2.11.0 numpy pytest hypothesis expecttest
#
# With torch the main test files of tests/torch run, too, on the installed wheel; they need pytest, hypothesis and
# expecttest. INSTALLER is an interpreter that has pip 23.1 or later; by default PYTHON itself. FOLDERS, if set, are
# folders, with colons between, that already hold packages, which saves downloads.
set -eu

wheel=$(realpath "$1")
python=$2
shift 2
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv --without-pip "$work/environment"
installed=$work/environment/bin/python
"${INSTALLER:-$python}" -m pip --python "$installed" install --quiet --disable-pip-version-check --no-compile "$wheel" "$@"

# Away from the checkout, whose fastdrop must not be found. Packages of the environment come before those in FOLDERS.
cd "$work"
site=$("$installed" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
echo "${FOLDERS:-}" | tr : '\n' > "$site/folders.pth"  # unlike PYTHONPATH also for processes that tests start
unset PYTHONPATH
export PYTHONDONTWRITEBYTECODE=1 NUMBA_CACHE_DIR="$work/numba"

"$installed" "$checkout/tests/compatibility.py" "$site"
"$installed" -m fastdrop selftest
if "$installed" -c 'import torch' 2> "$work/import.log"; then
    mkdir "$work/checkout"
    cp -r "$checkout/tests" "$checkout/pyproject.toml" "$work/checkout"
    cd "$work/checkout"
    "$installed" -m pytest -q -x -p no:cacheprovider tests/torch/functional/test_dropout.py \
        tests/torch/nn/test_dropout.py tests/torch/models/test_enable.py tests/torch/ops/test_ops.py
else
    tail -n 1 "$work/import.log"
fi
