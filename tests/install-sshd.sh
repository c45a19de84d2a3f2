#!/usr/bin/env bash
# Makes an sshd for tests/tests/hosts.rs, where the system has none: Debian's packages, unpacked into target/openssh and neither
# installed nor started. Running it again is instant.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target="${CARGO_TARGET_DIR:-$root/target}/openssh"

fail() {
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

command -v ssh >/dev/null && command -v ssh-keygen >/dev/null || fail "no ssh and ssh-keygen" "on Debian: apt-get install openssh-client"
command -v ip >/dev/null || fail "no ip" "on Debian: apt-get install iproute2"
[ -x /usr/sbin/sshd ] && exit 0
[ -x "$target/usr/sbin/sshd" ] && exit 0
command -v apt-get >/dev/null || fail "no sshd, and no apt-get to fetch one" "install OpenSSH's server"

staging=$(mktemp -d)
trap 'rm -rf "$staging"' EXIT
cd "$staging"
get() { apt-get -qq -o APT::Sandbox::User=root download openssh-server libwrap0; }
get 2>/dev/null || { apt-get -qq update && get; } || fail "cannot fetch openssh-server" "apt-get install openssh-server, or check the network"
for package in *.deb; do dpkg-deb -x "$package" unpacked; done
mkdir -p "$(dirname "$target")"
rm -rf "$target"
mv unpacked "$target"
