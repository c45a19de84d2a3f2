//go:build tools

// Package tools names what is built from this module, so that `go mod tidy` keeps it.
package tools

import _ "k8s.io/kubernetes/cmd/kube-apiserver/app"
import _ "k8s.io/kubernetes/cmd/kube-controller-manager/app"
