// Kernels of kernels.cu that other parts of the bridge call.
#pragma once

#include <ATen/core/Tensor.h>

namespace dyad {

// Whether `fold` supports this gradient.
bool folds(const at::Tensor& gradient);

// Sums copies `[copies, heads, width]` into `[rows, heads, width]`: row `r` is the sum of the copies with indices
// `places[starts[r]]` to `places[starts[r + 1] - 1]`. Both lists are int32.
at::Tensor fold(const at::Tensor& copies, const at::Tensor& starts, const at::Tensor& places, int64_t rows);

// As dyad_head_score (`head.cpp`), on contiguous bfloat16 logits `[rows, vocab]`, vocab a multiple of 8.
void head_score(const at::Tensor& policy, const at::Tensor* reference, const at::Tensor& targets, const at::Tensor& logps,
                const at::Tensor* reference_logps, const at::Tensor* facts, bool keep);

}  // namespace dyad
