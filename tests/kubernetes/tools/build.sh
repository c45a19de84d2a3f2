#!/usr/bin/env bash
# Builds a Kubernetes control plane into .tools/kubernetes/bin: etcd, kube-apiserver, kube-controller-manager, the JobSet
# controller and kustomize. All come from the Go module proxy, in the versions in go.mod and in this file. The first build takes about
# ten minutes on two cores.
#
#   tests/kubernetes/tools/build.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(mkdir -p "${1:-$here/../../../.tools/kubernetes/bin}" && cd "${1:-$here/../../../.tools/kubernetes/bin}" && pwd)
kubernetes=v1.35.4
kustomize=v5.8.0

command -v go >/dev/null || {
  printf 'error: no Go\n\nhint: install Go 1.26 or newer; only make test-kubernetes needs it\n' >&2
  exit 2
}
export GOFLAGS="-p=${GO_PARALLEL:-2} -mod=readonly -buildvcs=false -trimpath"
build() { # FOLDER PACKAGE NAME LDFLAGS
  [ -x "$bin/$3" ] && return
  echo "building $3 …" >&2
  (cd "$here/$1" && nice -n 19 go build -ldflags "-s -w ${4:-}" -o "$bin/$3" "$2")
}
version="-X k8s.io/component-base/version.gitVersion=$kubernetes -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=35"
build kubernetes ./etcd etcd
build kubernetes k8s.io/kubernetes/cmd/kube-apiserver kube-apiserver "$version"
build kubernetes k8s.io/kubernetes/cmd/kube-controller-manager kube-controller-manager "$version"
build jobset sigs.k8s.io/jobset jobset
[ -x "$bin/kustomize" ] || (echo "building kustomize …" >&2 && cd / && GOBIN="$bin" nice -n 19 go install "sigs.k8s.io/kustomize/kustomize/v5@$kustomize")
