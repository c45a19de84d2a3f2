// Rotary positions on devices other than the CPU, composed of libtorch's operators in few launches.
#include "bridge.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/roll.h>
#include <torch/csrc/autograd/custom_function.h>

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

// `x cos + roll(x, half) s` with `s = [-sin, sin]`: rolling by half the width aligns each value with its partner, so that
// neither a negation nor a concatenation is needed. Three launches forward and three backward; `x` is not saved.
struct Rotation : public Function<Rotation> {
  static at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, double sign) {
    auto partners = at::roll(x, {x.size(-1) / 2}, {-1});
    return at::mul(x, cos).addcmul_(partners, sin, sign);
  }

  static Variable forward(AutogradContext* context, const Variable& x, const Variable& cos, const Variable& sin) {
    context->save_for_backward({cos, sin});
    return rotated(x, cos, sin, 1.0);
  }

  // Rotates the gradient by the negative angles.
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    return {rotated(gradients[0], saved[0], saved[1], -1.0), Variable(), Variable()};
  }
};

}  // namespace

extern "C" {

// Rotates `[tokens, heads, width]` by angles `[tokens, 1, width]`. The first half of each row of `sin` is negated.
dyad_error dyad_rotate_half(at::Tensor* x, at::Tensor* cos, at::Tensor* sin, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(Rotation::apply(*x, *cos, *sin)); });
}

}  // extern "C"
