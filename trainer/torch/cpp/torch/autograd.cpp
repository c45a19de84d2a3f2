// Backward with given output gradients, and the fused AdamW.
#include "bridge.h"
#include "sinks.h"

#include <vector>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <torch/csrc/autograd/autograd.h>

namespace {

std::vector<at::Tensor> collect(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) list.push_back(*tensors[i]);
  return list;
}

}  // namespace

extern "C" {

// Writes d(sum_i <outputs[i], output_grads[i]>)/d(inputs[j]) into gradients[j]: a new tensor owned by the caller, or null if
// the outputs do not depend on the input. Frees the graph. If sinks[j] (float32) is not null, a linear layer of the bridge may
// add the gradient to it; then gradients[j] is null too.
dyad_error dyad_autograd_grad(at::Tensor* const* outputs, at::Tensor* const* output_grads, size_t n_outputs,
                              at::Tensor* const* inputs, size_t n_inputs, at::Tensor* const* sinks,
                              at::Tensor** gradients) {
  return guarded([&] {
    dyad::Sinks into;
    for (size_t j = 0; j < n_inputs; ++j)
      if (sinks[j] != nullptr) into.add(*inputs[j], *sinks[j]);
    auto result = torch::autograd::grad(collect(outputs, n_outputs), collect(inputs, n_inputs),
                                        collect(output_grads, n_outputs), /*retain_graph=*/false,
                                        /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t j = 0; j < n_inputs; ++j)
      gradients[j] = result[j].defined() ? new at::Tensor(std::move(result[j])) : nullptr;
  });
}

// One AdamW step (Loshchilov & Hutter 2019) on every parameter of the lists, in place. If `divisor` is not null, the gradients
// are divided by it first, in place.
dyad_error dyad_fused_adamw(at::Tensor* const* parameters, at::Tensor* const* gradients, at::Tensor* const* exp_avgs,
                            at::Tensor* const* exp_avg_sqs, at::Tensor* const* steps, size_t count, at::Tensor* divisor,
                            const double* hyper /* lr, beta1, beta2, weight_decay, eps */) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto p = collect(parameters, count), g = collect(gradients, count), m = collect(exp_avgs, count),
         v = collect(exp_avg_sqs, count), s = collect(steps, count);
    at::_fused_adamw_(p, g, m, v, /*max_exp_avg_sqs=*/at::TensorList{}, s, hyper[0], hyper[1], hyper[2], hyper[3],
                      hyper[4], /*amsgrad=*/false, /*maximize=*/false,
                      /*grad_scale=*/divisor == nullptr ? std::nullopt : std::make_optional(*divisor));
  });
}

}  // extern "C"
