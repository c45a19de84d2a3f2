// Matrix products on the CPU, without derivatives. Matrices are contiguous and of one supported kind; in bfloat16 the width of
// each is even.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace dyad {

// `x · wᵀ + added`. `added` is optional: `[columns]`, the same for all rows, or `[rows, columns]`.
at::Tensor projected(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& added);

// `y += x · wᵀ`, rounded once.
void add_projected(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w);

// `a · b`.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// `y += a · b`, rounded once.
void add_product(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b);

// `sum += aᵀ · b` in float32.
void add_outer(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

// The gradient `dyᵀ · x` of a weight. If the weight has a sink, adds the gradient to it in float32 and returns an undefined tensor.
at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight);

}  // namespace dyad
