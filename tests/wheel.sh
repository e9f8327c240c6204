#!/bin/sh
# Builds a wheel for Linux that runs with glibc 2.17 and later (manylinux2014), whatever this machine's glibc is: zig's
# clang links against the names that glibc 2.17 had. The wheel is tested in a clean environment outside the checkout,
# with the newest NumPy. TOOLS is an environment that has zig, auditwheel and what builds the wheel; OUT gets the wheel.
set -eu

LARGEST=1500000 # bytes

checkout=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
machine=$(uname -m)
platform=manylinux_2_17_$machine
python=$TOOLS/bin/python

step() { echo "== wheel: $*"; }

step "building for $platform with zig (minutes)"
printf '#!/bin/sh\nexec "%s" -m ziglang cc -target %s-linux-gnu.2.17 "$@"\n' "$python" "$machine" > "$work/cc"
chmod +x "$work/cc"
CC="$work/cc" LDSHARED="$work/cc -shared" FASTDROP_REQUIRE_EXTENSION=1 \
    "$python" -m build --no-isolation --outdir "$work/built" "$checkout" > "$work/build.log" 2>&1 \
    || { tail -n 40 "$work/build.log"; exit 1; }

step "auditwheel"
PATH="$TOOLS/bin:$PATH" "$python" -m auditwheel repair --plat "$platform" -w "$work/repaired" "$work"/built/*.whl \
    > "$work/repair.log" 2>&1 || { cat "$work/repair.log"; exit 1; }
wheel=$(echo "$work"/repaired/*.whl)
"$python" -m auditwheel show "$wheel" | tee "$work/show.log"
grep -q "\"$platform\"" "$work/show.log" || { echo "the wheel should run on $platform" && exit 1; }
case $wheel in
*-cp311-abi3-*"$platform"*) ;;
*) echo "the wheel's tag should be cp311-abi3-$platform, but is $(basename "$wheel")" && exit 1 ;;
esac
bytes=$(wc -c < "$wheel")
echo "$(basename "$wheel"): $bytes bytes"
[ "$bytes" -le "$LARGEST" ] || { echo "the wheel should have at most $LARGEST bytes" && exit 1; }

cd "$work"
step "self-test, newest NumPy"
"$python" -m venv "$work/clean"
"$work/clean/bin/pip" install --quiet --disable-pip-version-check --no-compile "$wheel"
"$work/clean/bin/python" -c 'import fastdrop._native'
"$work/clean/bin/fastdrop" selftest

mkdir -p "$OUT"
cp "$wheel" "$OUT"
step "passed: $OUT/$(basename "$wheel")"
