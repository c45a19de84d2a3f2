// Linear layers of one input on devices other than the CPU, with their adapters: one node of autograd's graph for all of them.
// Products add to what is there, forward and back, so that no pass over memory only adds; adapters come first, because a large
// product hides what it reads and a narrow one does not.
#include "bridge.h"
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

// Whether a product of such factors can be added to a float32 sum in one go: a kernel of CUDA's alone.
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

extern "C" {

// `x wᵀ + bias + scale (x aᵀ) bᵀ`; null where there is no bias, or no adapter.
struct dyad_linear {
  at::Tensor* weight;
  at::Tensor* bias;
  at::Tensor* a;
  at::Tensor* b;
  double scale;
};

}  // extern "C"

namespace {

// Which of the tensors after the input belong to a layer; `bias` and `a` are -1 where there are none, and `b` follows `a`.
struct Place {
  int64_t weight, bias, a;
};

struct Linears : public Function<Linears> {
  static variable_list forward(AutogradContext* context, const Variable& x, at::TensorList tensors,
                               const std::vector<Place>& places, const std::vector<double>& scales) {
    variable_list saved{x}, outputs;
    saved.insert(saved.end(), tensors.begin(), tensors.end());
    for (size_t i = 0; i < places.size(); ++i) {
      auto [weight, bias, a] = places[i];
      auto shift = bias < 0 ? std::nullopt : std::make_optional(tensors[bias]);
      if (a < 0) {
        saved.emplace_back();
        outputs.push_back(at::linear(x, tensors[weight], shift));
        continue;
      }
      auto low = at::mm(x, tensors[a].t()).mul_(scales[i]), up = tensors[a + 1].t();
      auto y = shift ? at::addmm(*shift, low, up) : at::mm(low, up);
      saved.push_back(low);
      outputs.push_back(y.addmm_(x, tensors[weight].t()));
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
    // Input, tensors, and two arguments that are none.
    variable_list found(1 + count + 2);
    auto wanted = [&](int64_t place) { return context->needs_input_grad(1 + place); };
    for (size_t i = 0; i < places.size(); ++i) {
      if (!gradients[i].defined()) continue;
      auto [weight, bias, a] = places[i];
      auto dy = gradients[i].contiguous();
      if (wanted(weight)) found[1 + weight] = weight_gradient(dy, x, tensor(weight));
      if (bias >= 0 && wanted(bias)) found[1 + bias] = dy.sum(0);
      if (a >= 0) {
        auto low = at::mm(dy, tensor(a + 1)).mul_(scales[i]);
        if (wanted(a)) found[1 + a] = weight_gradient(low, x, tensor(a));
        if (wanted(a + 1)) found[2 + a] = weight_gradient(dy, saved[1 + count + i], tensor(a + 1));
        if (context->needs_input_grad(0)) add(found[0], low, tensor(a));
      }
      if (context->needs_input_grad(0)) add(found[0], dy, tensor(weight));
    }
    return found;
  }

 private:
  static void add(at::Tensor& sum, const at::Tensor& left, const at::Tensor& right) {
    sum = sum.defined() ? sum.addmm_(left, right) : at::mm(left, right);
  }

  // Into the gradient that a step adds up, in float32, where the caller names one and the device's product can.
  static Variable weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) {
    const at::Tensor* sink = dyad::Sinks::of(weight);
    if (sink == nullptr || !dyad::adds_wide(*sink, dy)) return at::mm(dy.t(), x);
    dyad::add_wide(*sink, dy, x);
    return Variable();
  }

  static std::vector<int64_t> flat(const std::vector<Place>& places) {
    std::vector<int64_t> values;
    for (const auto& place : places) values.insert(values.end(), {place.weight, place.bias, place.a});
    return values;
  }

  static std::vector<Place> unflat(const std::vector<int64_t>& values) {
    std::vector<Place> places;
    for (size_t i = 0; i < values.size(); i += 3) places.push_back({values[i], values[i + 1], values[i + 2]});
    return places;
  }
};

}  // namespace

extern "C" {

// `sum += aᵀ b` in float32, of bfloat16 on a CUDA device; says whether it did.
dyad_error dyad_add_outer_wide(at::Tensor* sum, at::Tensor* a, at::Tensor* b, bool* done) {
  return guarded([&] {
    *done = dyad::adds_wide(*sum, *a);
    if (*done) dyad::add_wide(*sum, *a, *b);
  });
}

// `[tokens, in]` to one `[tokens, out]` a layer: new tensors, owned by the caller.
dyad_error dyad_linears(at::Tensor* x, const dyad_linear* linears, size_t count, at::Tensor** ys) {
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
      auto weight = put(linear->weight), bias = put(linear->bias), a = put(linear->a);
      put(linear->b);
      places.push_back({weight, bias, a});
      scales.push_back(linear->scale);
    }
    auto outputs = Linears::apply(*x, at::TensorList(tensors), places, scales);
    for (size_t i = 0; i < count; ++i) ys[i] = new at::Tensor(std::move(outputs[i]));
  });
}

}  // extern "C"
