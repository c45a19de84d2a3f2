// Linear layers of one input, with their adapters, as one node of autograd's graph. Forward and backward, products add to existing
// tensors, so that no extra pass over memory only adds. Adapters come first: the large product then reads their result while it
// computes, and a narrow product could not hide that read.
#include "bridge.h"
#include "products.h"
#include "sinks.h"

#include <vector>

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace dyad {

// Whether one operator can add a product of such factors to a float32 sum; only CUDA devices have it.
bool adds_wide(const at::Tensor& sum, const at::Tensor& factor) {
  return sum.is_cuda() && sum.scalar_type() == at::kFloat && sum.is_contiguous() && factor.scalar_type() == at::kBFloat16;
}

// `sum += aᵀ b`.
void add_wide(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  at::NoGradGuard no_grad;
  auto out = sum;
  at::addmm_out(out, sum, a.t(), b, at::kFloat);
}

}  // namespace dyad

namespace {

// Indices of a layer's tensors among the tensors after the input; -1 if there is none. `b` follows `a`.
struct Place {
  int64_t weight, bias, onto, a;
  // The tensor that is added to the layer's first product.
  int64_t added() const { return onto < 0 ? bias : onto; }
};

// Products by libtorch, on any device.
struct Libtorch {
  static at::Tensor project(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& added) {
    return at::linear(x, w, added);
  }
  static void add_projected(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w) { y.addmm_(x, w.t()); }
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b) { return at::mm(a, b); }
  static void add_product(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b) { y.addmm_(a, b); }
  // Adds the gradient to the weight's sink in float32 and returns an undefined tensor, if there is a sink and the device can;
  // otherwise returns the gradient.
  static at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) {
    const at::Tensor* sink = dyad::Sinks::of(weight);
    if (sink == nullptr || !dyad::adds_wide(*sink, dy)) return at::mm(dy.t(), x);
    dyad::add_wide(*sink, dy, x);
    return at::Tensor();
  }
};

// The bridge's own products, on the CPU.
struct Ours {
  static at::Tensor project(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& added) {
    return dyad::projected(x, w, added);
  }
  static void add_projected(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w) { dyad::add_projected(y, x, w); }
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b) { return dyad::product(a, b); }
  static void add_product(const at::Tensor& y, const at::Tensor& a, const at::Tensor& b) { dyad::add_product(y, a, b); }
  static at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) {
    return dyad::weight_gradient(dy, x, weight);
  }
};

template <typename By>
struct Linears : public Function<Linears<By>> {
  static variable_list forward(AutogradContext* context, const Variable& x, at::TensorList tensors,
                               const std::vector<Place>& places, const std::vector<double>& scales) {
    auto input = x.contiguous();
    variable_list saved{input}, outputs;
    saved.insert(saved.end(), tensors.begin(), tensors.end());
    for (size_t i = 0; i < places.size(); ++i) {
      auto place = places[i];
      auto added = place.added() < 0 ? std::nullopt : std::make_optional(tensors[place.added()].contiguous());
      if (place.onto >= 0) saved[1 + place.onto] = Variable();
      if (place.a < 0) {
        saved.emplace_back();
        outputs.push_back(By::project(input, tensors[place.weight], added));
        continue;
      }
      auto low = By::project(input, tensors[place.a], std::nullopt).mul_(scales[i]);
      auto y = By::project(low, tensors[place.a + 1], added);
      By::add_projected(y, input, tensors[place.weight]);
      saved.push_back(low);
      outputs.push_back(y);
    }
    context->save_for_backward(std::move(saved));
    context->saved_data["places"] = flat(places);
    context->saved_data["scales"] = scales;
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto places = unflat(context->saved_data["places"].toIntVector());
    auto scales = context->saved_data["scales"].toDoubleVector();
    const auto& x = saved[0];
    auto tensor = [&](int64_t place) -> const at::Tensor& { return saved[1 + place]; };
    auto count = saved.size() - 1 - places.size();
    // Gradients of the input, of the tensors, and of two arguments that are not tensors.
    variable_list found(1 + count + 2);
    auto wanted = [&](int64_t place) { return context->needs_input_grad(1 + place); };
    for (size_t i = 0; i < places.size(); ++i) {
      if (!gradients[i].defined()) continue;
      auto [weight, bias, onto, a] = places[i];
      auto dy = gradients[i].contiguous();
      if (wanted(weight)) found[1 + weight] = By::weight_gradient(dy, x, tensor(weight));
      if (bias >= 0 && wanted(bias)) found[1 + bias] = dy.sum(0);
      if (onto >= 0 && wanted(onto)) found[1 + onto] = dy;
      if (a >= 0) {
        auto low = By::product(dy, tensor(a + 1)).mul_(scales[i]);
        if (wanted(a)) found[1 + a] = By::weight_gradient(low, x, tensor(a));
        if (wanted(a + 1)) found[2 + a] = By::weight_gradient(dy, saved[1 + count + i], tensor(a + 1));
        if (context->needs_input_grad(0)) add(found[0], low, tensor(a));
      }
      if (context->needs_input_grad(0)) add(found[0], dy, tensor(weight));
    }
    return found;
  }

 private:
  static void add(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
    if (sum.defined())
      By::add_product(sum, left, right);
    else
      sum = By::product(left, right);
  }

  static std::vector<int64_t> flat(const std::vector<Place>& places) {
    std::vector<int64_t> values;
    for (const auto& place : places) values.insert(values.end(), {place.weight, place.bias, place.onto, place.a});
    return values;
  }

  static std::vector<Place> unflat(const std::vector<int64_t>& values) {
    std::vector<Place> places;
    for (size_t i = 0; i < values.size(); i += 4)
      places.push_back({values[i], values[i + 1], values[i + 2], values[i + 3]});
    return places;
  }
};

}  // namespace

extern "C" {

// `sum += aᵀ b` in float32 for bfloat16 tensors on a CUDA device. `done` receives whether it did.
dyad_error dyad_add_outer_wide(at::Tensor* sum, at::Tensor* a, at::Tensor* b, bool* done) {
  return guarded([&] {
    *done = dyad::adds_wide(*sum, *a);
    if (*done) dyad::add_wide(*sum, *a, *b);
  });
}

// Maps `[tokens, in]` to one `[tokens, out]` per layer: new tensors owned by the caller. `own_products` uses the products of
// `products.h`, which must support all matrices; in bfloat16 all widths, ranks included, must then be even.
dyad_error dyad_linears(at::Tensor* x, const dyad_linear* linears, size_t count, bool own_products, at::Tensor** ys) {
  return guarded([&] {
    std::vector<at::Tensor> tensors;
    std::vector<Place> places;
    std::vector<double> scales;
    auto put = [&](at::Tensor* tensor) -> int64_t {
      if (tensor == nullptr) return -1;
      tensors.push_back(*tensor);
      return static_cast<int64_t>(tensors.size()) - 1;
    };
    for (const auto* linear = linears; linear != linears + count; ++linear) {
      auto weight = put(linear->weight), bias = put(linear->bias), onto = put(linear->onto), a = put(linear->a);
      put(linear->b);
      places.push_back({weight, bias, onto, a});
      scales.push_back(linear->scale);
    }
    auto outputs = own_products ? Linears<Ours>::apply(*x, at::TensorList(tensors), places, scales)
                        : Linears<Libtorch>::apply(*x, at::TensorList(tensors), places, scales);
    for (size_t i = 0; i < count; ++i) ys[i] = new at::Tensor(std::move(outputs[i]));
  });
}

}  // extern "C"
