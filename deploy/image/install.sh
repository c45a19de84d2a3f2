#!/usr/bin/env bash
# Copies the image's files, except Debian's, into a folder: programs, libtorch's libraries, an example. Used by the Dockerfile and by
# deploy/image/test.sh.
#
#   deploy/image/install.sh TARGET     after `make build` (and `make cuda` for the CUDA image)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
target=${1:?usage: deploy/image/install.sh TARGET}

# The trainer looks for libtorch in ../../.libtorch, relative to its own folder.
install -d "$target/opt/dyad/usr/bin" "$target/opt/dyad/.libtorch/torch/lib" "$target/opt/dyad/example"
install -m 755 "$root"/target/release/{launcher,coordinator,trainer} "$target/opt/dyad/usr/bin/"
# Only shared libraries; no headers.
cp -a "$root"/.libtorch/torch/lib/*.so* "$target/opt/dyad/.libtorch/torch/lib/"
if [ -d "$root/.libtorch/nvidia" ]; then
  (cd "$root/.libtorch" && find nvidia -name '*.so*' -print0 | cpio --quiet --null -pdm "$target/opt/dyad/.libtorch")
fi

# A small model with random weights and the quickstart's pairs, to try out a cluster.
cp "$root"/examples/quickstart/{train,validation}.jsonl "$target/opt/dyad/example/"
"$root/target/release/trainer" new-model --out "$target/opt/dyad/example/model" --texts "$root/examples/quickstart/train.jsonl" \
  --vocab-size 600 --hidden-size 64 --intermediate-size 128 --layers 2 --overwrite

# Mount points of pods, which cannot be created later in a read-only root.
install -d "$target"/{output,data,etc/dyad/run,etc/dyad/tls}
find "$target/opt/dyad" -type d -exec chmod 755 {} + -o -type f -exec chmod a+r {} +
