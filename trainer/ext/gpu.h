// Kernels of kernels.cu that other parts of the bridge call.
#pragma once

#include <ATen/core/Tensor.h>

namespace dyad {

// Whether `fold` serves gradients like this one.
bool folds(const at::Tensor& gradient);

// Of copied rows `[copies, heads, width]`: for each of `rows` rows the sum over its copies, whose places `places` names from
// `starts[row]` on, both int32.
at::Tensor fold(const at::Tensor& copies, const at::Tensor& starts, const at::Tensor& places, int64_t rows);

}  // namespace dyad
