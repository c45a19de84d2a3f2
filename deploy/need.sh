#!/usr/bin/env bash
# Checks the requirements of a Makefile target before it runs. Prints everything that is missing and how to get it.
#
#   deploy/need.sh TARGET NEED…
#
# A NEED is a program, root, pip or venv (for python3), space=GB (free in this checkout), x86-64 or gpu.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=$1
shift

# package PROGRAM: prints the Debian package that contains it.
package() {
  case $1 in
    pip) echo python3-pip ;;
    ssh | ssh-keygen) echo openssh-client ;;
    ip | tc) echo iproute2 ;;
    strip | readelf) echo binutils ;;
    dpkg-deb) echo dpkg ;;
    apt-get) echo apt ;;
    *) echo "$1" ;;
  esac
}

missing=() packages=() hints=()
for need in "$@"; do
  case $need in
    root) [ "$(id -u)" = 0 ] || { missing+=("root's rights"); hints+=("run it as root"); } ;;
    x86-64)
      [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || { missing+=("x86-64 Linux (this is $(uname -sm))"); hints+=("use such a machine"); } ;;
    gpu)
      [ -e /proc/driver/nvidia/version ] || { missing+=("an NVIDIA GPU with its driver"); hints+=("use a machine with a GPU"); } ;;
    space=*)
      free=$(df --output=avail -BG "$root" | tail -n 1 | tr -dc 0-9)
      [ "$free" -ge "${need#space=}" ] || { missing+=("${need#space=} GB of free disk in $root (there are $free)"); hints+=("make room"); } ;;
    pip)
      python3 -m pip --version >/dev/null 2>&1 || { missing+=("pip for python3"); packages+=(python3-pip); } ;;
    venv)
      python3 -c 'import venv' 2>/dev/null || { missing+=("python3's venv"); packages+=(python3-venv); } ;;
    cargo)
      command -v cargo >/dev/null || { missing+=("Rust (cargo)"); hints+=("install Rust 1.88 or newer with rustup, https://rustup.rs"); } ;;
    fmt | clippy)
      cargo "$need" --version >/dev/null 2>&1 || { missing+=("cargo $need"); hints+=("rustup component add rustfmt clippy"); } ;;
    go)
      command -v go >/dev/null || { missing+=("Go"); hints+=("install Go 1.26 or newer, https://go.dev/dl"); } ;;
    *)
      command -v "$need" >/dev/null || [ -x "/usr/sbin/$need" ] || { missing+=("$need"); packages+=("$(package "$need")"); } ;;
  esac
done
[ ${#missing[@]} = 0 ] && exit 0

[ ${#packages[@]} = 0 ] || hints=("on Debian and Ubuntu: apt-get install $(printf '%s\n' "${packages[@]}" | sort -u | xargs)" "${hints[@]}")
list=$(printf '%s; ' "${missing[@]}")
printf 'error: %s needs what is not here: %s\n\nhint: %s\n' "$target" "${list%; }" "$(printf '%s; ' "${hints[@]}" | sed 's/; $//')" >&2
exit 2
