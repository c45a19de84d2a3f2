#!/usr/bin/env bash
# Fetches Slurm and, if the system has none, an sshd for the tests. Unpacks Debian's packages into target/slurm and target/openssh,
# and neither installs nor starts anything. Running it again is instant.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target="${CARGO_TARGET_DIR:-$root/target}"

fail() {
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

# unpack NAME PACKAGE…
unpack() {
  local name=$1 staging
  shift
  [ -d "$target/$name" ] && return
  command -v apt-get >/dev/null || fail "no $name for the tests, and no apt-get to fetch it" "run the tests on Debian, as root"
  staging=$(mktemp -d)
  get() { (cd "$staging" && apt-get -qq -o APT::Sandbox::User=root download "$@"); }
  get "$@" 2>/dev/null || { apt-get -qq update && get "$@"; } || fail "cannot fetch $*" "check the network and apt's sources"
  for package in "$staging"/*.deb; do dpkg-deb -x "$package" "$staging/unpacked"; done
  mkdir -p "$target"
  mv -T "$staging/unpacked" "$target/$name"
  rm -rf "$staging"
}

command -v ssh >/dev/null && command -v ssh-keygen >/dev/null || fail "no ssh and ssh-keygen" "on Debian: apt-get install openssh-client"
command -v ip >/dev/null || fail "no ip" "on Debian: apt-get install iproute2"
[ -x /usr/sbin/sshd ] || unpack openssh openssh-server libwrap0
unpack slurm slurmctld slurmd slurm-client slurm-wlm-basic-plugins libslurm38 libmunge2 libhwloc15 libpmix2 liblz4-1 \
  libhttp-parser2.9 libyaml-0-2 libjson-c5 libjwt0 librdkafka1 libfreeipmi17 librrd8 libhdf5-103-1
