// Kernels of kernels.cu that other parts of the bridge call.
#pragma once

#include <ATen/core/Tensor.h>

namespace dyad {

// Whether `fold` serves gradients like this one.
bool folds(const at::Tensor& gradient);

// Of copied rows `[copies, heads, width]`: for each of `rows` rows the sum over its copies, whose places `places` names from
// `starts[row]` on, both int32.
at::Tensor fold(const at::Tensor& copies, const at::Tensor& starts, const at::Tensor& places, int64_t rows);

// As dyad_head_score (`head.cpp`), on contiguous bfloat16 logits `[rows, vocab]`, vocab a multiple of 8.
void head_score(const at::Tensor& policy, const at::Tensor* reference, const at::Tensor& targets, const at::Tensor& logps,
                const at::Tensor* reference_logps, const at::Tensor* kl, bool keep);

}  // namespace dyad
