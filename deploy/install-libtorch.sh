#!/usr/bin/env bash
# Installs the pinned libtorch 2.11.0 into .libtorch/ at the root of the checkout.
#
#   deploy/install-libtorch.sh          lean set for CPUs (1.2 GB on disk)
#   deploy/install-libtorch.sh --cuda   everything the CUDA back end loads (about 5 GB)
#
# Every wheel is pinned by version and SHA-256. The wheel for CPython 3.11 is taken whatever Python is installed: only its
# C++ libraries and headers are used. Running it again is instant.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target="$root/.libtorch"
variant=cpu

fail() {
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

case "${1:-}" in
  "") ;;
  --cuda) variant=cuda ;;
  *) fail "unknown option $1" "usage: deploy/install-libtorch.sh [--cuda]" ;;
esac

requirements="$root/deploy/libtorch-$variant.txt"
wanted=$(sha256sum "$requirements" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)
stamp="$target/.installed-$variant"
[ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && exit 0
# The CUDA set contains the CPU set.
[ "$variant" = cpu ] && [ -f "$target/.installed-cuda" ] && exit 0

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "libtorch is pinned for Linux x86-64, this is $(uname -sm)" "use an x86-64 Linux machine"
command -v g++ >/dev/null || fail "no C++ compiler (g++)" "on Debian: apt-get install g++"
python3 -m pip --version >/dev/null 2>&1 || fail "no pip for python3" "on Debian: apt-get install python3-pip"

staging=$(mktemp -d "$root/.libtorch-staging.XXXXXX")
trap 'rm -rf "$staging"' EXIT
echo "installing libtorch 2.11.0 ($variant) into .libtorch/ …" >&2
platforms=()
for glibc in 28 27 25 18 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
python3 -m pip install --quiet --disable-pip-version-check --no-warn-script-location --root-user-action ignore \
  --target "$staging" --no-deps --require-hashes --only-binary :all: --no-compile \
  --implementation cp --python-version 3.11 --abi cp311 --abi none "${platforms[@]}" \
  -r "$requirements" || fail "pip could not install $requirements" "check the network and free disk space, then run again"

# Keep the libraries and headers; the Python sources around them are of no use here.
find "$staging/torch" -mindepth 1 -maxdepth 1 ! -name lib ! -name include ! -name share -exec rm -rf {} +
find "$staging" -mindepth 1 -maxdepth 1 ! -name torch ! -name nvidia -exec rm -rf {} +
rm -f "$staging/torch/lib/libtorch_python.so"
echo "$wanted" > "$staging/.installed-$variant"
rm -rf "$target"
mv "$staging" "$target"
chmod 755 "$target"
trap - EXIT
