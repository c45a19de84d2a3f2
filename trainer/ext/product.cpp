// Products of linear layers and of the LM head on the CPU, with their derivatives. Gradients of weights go straight into the
// float32 gradient that a step adds up, where the caller names one.
#include "products.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "bridge.h"
#include "product.h"
#include "sinks.h"
#include "tensors.h"

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

// Whether these products are faster than libtorch's here.
bool serves(bool bfloat16) { return bfloat16 ? dyad::has_tiles() : dyad::has_blocks(); }

std::vector<c10::IValue> seen(const at::Tensor& a, const at::Tensor& b) { return {a, b}; }

template <typename T>
Added<T> added_of(const std::optional<at::Tensor>& added) {
  if (!added) return {};
  return {data<T>(*added), added->dim() == 1 ? 0 : added->size(1)};
}

void project_into(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& added) {
  RECORD_FUNCTION("dyad::product_turned", seen(x, w));
  by_kind(x, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    dyad::Right<T> right{data<T>(w), w.size(1), w.size(0), true};
    dyad::Product<T>(data<T>(x), x.size(0), right, added_of<T>(added), data<T>(y)).run();
  });
}

void multiply_into(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& added) {
  RECORD_FUNCTION("dyad::product", seen(a, b));
  by_kind(a, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    dyad::Right<T> right{data<T>(b), b.size(0), b.size(1), false};
    dyad::Product<T>(data<T>(a), a.size(0), right, added_of<T>(added), data<T>(y)).run();
  });
}

}  // namespace

namespace dyad {

at::Tensor projected(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& added) {
  auto y = at::empty({x.size(0), w.size(0)}, x.options());
  project_into(y, x, w, added);
  return y;
}

void add_projected(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w) { project_into(y, x, w, y); }

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  auto y = at::empty({a.size(0), b.size(1)}, a.options());
  multiply_into(y, a, b, std::nullopt);
  return y;
}

void add_product(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b) { multiply_into(y, a, b, y); }

void add_outer(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  RECORD_FUNCTION("dyad::product_added", seen(a, b));
  by_kind(a, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    add_outer_product(a.size(0), a.size(1), b.size(1), data<T>(a), data<T>(b), data<float>(sum));
  });
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) {
  if (const at::Tensor* sink = Sinks::of(weight)) {
    add_outer(*sink, dy, x);
    return at::Tensor();
  }
  auto sum = at::zeros(weight.sizes(), weight.options().dtype(at::kFloat));
  add_outer(sum, dy, x);
  return sum.to(weight.scalar_type());
}

}  // namespace dyad

namespace {

// `y = x wᵀ + bias`.
struct Project : public Function<Project> {
  static Variable forward(AutogradContext* context, const Variable& x, const Variable& weight,
                          const std::optional<Variable>& bias) {
    auto input = x.contiguous();
    context->save_for_backward({input, weight});
    context->saved_data["biased"] = bias.has_value();
    return dyad::projected(input, weight, bias);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto &x = saved[0], &weight = saved[1];
    auto dy = gradients[0].contiguous();
    Variable dx, dw, db;
    if (context->needs_input_grad(0)) dx = dyad::product(dy, weight);
    if (context->needs_input_grad(1)) dw = dyad::weight_gradient(dy, x, weight);
    if (context->saved_data["biased"].toBool() && context->needs_input_grad(2)) db = dy.sum(0);
    return {dx, dw, db};
  }
};

}  // namespace

extern "C" {

// Whether the products below serve matrices of bfloat16, else of float32.
bool dyad_products_serve(bool bfloat16) { return serves(bfloat16); }

// `x · weightᵀ + bias`, a new tensor owned by the caller; `bias` may be null. With its derivative. Here and below matrices are on
// the CPU, contiguous and of one kind that is served; in bfloat16 the width of each is even.
dyad_error dyad_project(at::Tensor* x, at::Tensor* weight, at::Tensor* bias, at::Tensor** y) {
  return guarded([&] {
    *y = new at::Tensor(Project::apply(*x, *weight, bias == nullptr ? std::nullopt : std::make_optional(*bias)));
  });
}

// `a · b`, a new tensor owned by the caller. Without a derivative.
dyad_error dyad_product(at::Tensor* a, at::Tensor* b, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(dyad::product(*a, *b)); });
}

// `sum += aᵀ · b`; the sum is float32.
dyad_error dyad_add_outer(at::Tensor* sum, at::Tensor* a, at::Tensor* b) {
  return guarded([&] { dyad::add_outer(*sum, *a, *b); });
}

}  // extern "C"
