#!/usr/bin/env bash
# Runs the steps of deploy/Dockerfile's last stage in a root made by debootstrap. Then runs the programs there as the image's user with
# a read-only root: --help, and a tiny training on the CPU. Needs root; pulls and builds no image.
#
#   deploy/image/test.sh [FOLDER]      creates the root in FOLDER [default: .tools/image] and keeps it there
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
image=$(mkdir -p "${1:-$root/.tools/image}" && cd "${1:-$root/.tools/image}" && pwd)
suite=bookworm

[ "$(id -u)" = 0 ] || { printf 'error: a new root needs root\n\nhint: run as root\n' >&2; exit 2; }
command -v debootstrap >/dev/null || { printf 'error: no debootstrap\n\nhint: apt-get install debootstrap\n' >&2; exit 2; }

if [ ! -f "$image/.complete" ]; then
  echo "making a Debian root in $image …" >&2
  rm -rf "${image:?}"/*
  packages=$(sed 's/#.*//' "$root/deploy/image/packages.txt" | xargs | tr ' ' ,)
  debootstrap --variant=minbase --include="$packages" "$suite" "$image" >"$image.log" 2>&1 || { tail -5 "$image.log" >&2; exit 1; }
  rm -rf "$image"/var/lib/apt/lists/* "$image"/var/cache/apt/*
  touch "$image/.complete"
fi
rm -rf "$image/opt/dyad"
"$root/deploy/image/install.sh" "$image" >&2
echo "image: $(du -sm --exclude=opt "$image" | cut -f1) MB Debian, $(du -sm "$image/opt/dyad" | cut -f1) MB Dyad and libtorch" >&2

# As a container runtime does: a read-only root, writable /tmp and /output, the image's environment and user.
in_image() {
  unshare --mount --propagation private bash -c '
    set -e
    image=$1; shift
    mount --bind "$image" "$image"; mount -o remount,bind,ro "$image"
    mount -t proc proc "$image/proc"; mount --rbind /dev "$image/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$image/tmp"; mount -t tmpfs -o mode=1777 tmpfs "$image/output"
    exec chroot --userspec=65532:65532 "$image" /usr/bin/env -i PATH=/opt/dyad/usr/bin:/usr/bin:/bin HOME=/tmp "$@"' in-image "$image" "$@"
}
in_image launcher --help >/dev/null
in_image coordinator --help >/dev/null
if in_image touch /opt/dyad/x 2>/dev/null; then echo "error: the root can be written" >&2; exit 1; fi
in_image bash -c 'set -e; cd /tmp
printf "%s\n" "model = \"/opt/dyad/example/model\"" "training_file = \"/opt/dyad/example/train.jsonl\"" \
  "output_dir = \"/output/run\"" "max_steps = 4" > run.toml
launcher --nodes 2 --gpus-per-node 0 --config run.toml
test -f /output/run/final/model.safetensors && test "$(wc -l < /output/run/metrics.jsonl)" = 4'
echo "the image's programs run as 65532 with a read-only root"
