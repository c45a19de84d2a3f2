// Products of linear layers and of the LM head on the CPU, in blocks.
#include "products.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>

#include "bridge.h"
#include "product.h"
#include "sinks.h"
#include "tensors.h"

namespace {

// Whether these products are faster than libtorch's on this CPU.
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

extern "C" {

// Whether to use these products on this CPU for bfloat16 matrices, or else for float32 matrices.
bool dyad_products_serve(bool bfloat16) { return serves(bfloat16); }

// Returns `a · b` as a new tensor owned by the caller, without a derivative. Here and below `products.h` states the requirements on
// matrices.
dyad_error dyad_product(at::Tensor* a, at::Tensor* b, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(dyad::product(*a, *b)); });
}

// `sum += aᵀ · b`; the sum is float32.
dyad_error dyad_add_outer(at::Tensor* sum, at::Tensor* a, at::Tensor* b) {
  return guarded([&] { dyad::add_outer(*sum, *a, *b); });
}

}  // extern "C"
