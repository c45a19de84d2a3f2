// Attention over packed runs of queries in one call per layer, by libtorch's variable-length kernels on CUDA devices. A run's
// last query sees its last key, and each query before it one key less (FlashAttention-2's bottom-right causal mask). Only the
// dispatcher's operators are called, so that nothing here links CUDA.
#include "bridge.h"
#include "gpu.h"

#include <limits>
#include <tuple>

#include <ATen/TensorOperators.h>
#include <ATen/ops/_efficient_attention_backward.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

enum Kernel : int64_t { kFlash = 0, kEfficient = 1 };

// The memory-efficient kernel's code for FlashAttention-2's bottom-right causal mask.
constexpr int64_t kCausalFromBottomRight = 2;

struct Shape {
  int64_t kernel, max_queries, max_keys, rows, group;
  double flops;

  // FlashAttention-2 regroups heads if the bound is one query, and its backward pass does not undo that. A bound of two is also
  // valid and prevents it.
  int64_t query_bound() const { return kernel == kFlash ? std::max<int64_t>(max_queries, 2) : max_queries; }
  int64_t key_bound() const { return kernel == kFlash ? std::max<int64_t>(max_keys, 2) : max_keys; }
};

// Records the kernel and its floating-point operations for profiles, because shapes do not tell the lengths of runs.
struct Mark {
  at::RecordFunction record{at::RecordScope::FUNCTION};
  Mark(const Shape& shape, const char* direction, double times) {
    if (!record.isActive()) return;
    std::string name = "dyad::attention ";
    name += shape.kernel == kFlash ? "flash " : "efficient ";
    record.before(name + direction + " " + std::to_string(static_cast<int64_t>(times * shape.flops)));
  }
};

at::Tensor gathered(const at::Tensor& x, const at::Tensor& rows) { return rows.defined() ? x.index_select(0, rows) : x.contiguous(); }

// The memory-efficient kernel needs a batch axis, and as many key heads as query heads.
at::Tensor batched(const at::Tensor& x, int64_t group) {
  if (group == 1) return x.unsqueeze(0);
  return x.unsqueeze(2).expand({x.size(0), x.size(1), group, x.size(2)}).reshape({1, x.size(0), x.size(1) * group, x.size(2)});
}

// The lists `gather`, `starts` and `places` of dyad_varlen_attention; undefined if keys are not copied.
struct Copies {
  at::Tensor rows, starts, places;
};

// Sums the gradients of copied heads and of copied rows.
at::Tensor returned(at::Tensor gradient, const Copies& copies, const Shape& shape) {
  if (shape.kernel == kEfficient) {
    gradient = gradient.squeeze(0);
    if (shape.group > 1)
      gradient = gradient.view({gradient.size(0), gradient.size(1) / shape.group, shape.group, gradient.size(2)}).sum(2);
  }
  if (!copies.rows.defined()) return gradient;
  if (dyad::folds(gradient)) return dyad::fold(gradient, copies.starts, copies.places, shape.rows);
  return at::zeros({shape.rows, gradient.size(1), gradient.size(2)}, gradient.options()).index_add_(0, copies.rows, gradient);
}

struct VarlenAttention : public Function<VarlenAttention> {
  static Variable forward(AutogradContext* context, const Variable& query, const Variable& key, const Variable& value,
                          const Variable& queries, const Variable& keys, const Copies& copies, Shape shape) {
    Mark mark(shape, "forward", 1.0);
    const auto& rows = copies.rows;
    auto q = query.contiguous(), k = gathered(key, rows), v = gathered(value, rows);
    at::Tensor out, lse, first, second;
    if (shape.kernel == kFlash) {
      std::tie(out, lse, first, second, std::ignore) =
          at::_flash_attention_forward(q, k, v, queries, keys, shape.query_bound(), shape.key_bound(), /*dropout_p=*/0.0,
                                       /*is_causal=*/true, /*return_debug_mask=*/false);
    } else {
      q = batched(q, 1), k = batched(k, shape.group), v = batched(v, shape.group);
      std::tie(out, lse, first, second, std::ignore, std::ignore) = at::_efficient_attention_forward(
          q, k, v, /*bias=*/std::nullopt, queries, keys, shape.query_bound(), shape.key_bound(), /*dropout_p=*/0.0,
          kCausalFromBottomRight, /*compute_log_sumexp=*/true);
    }
    context->save_for_backward({q, k, v, out, lse, first, second, queries, keys, rows, copies.starts, copies.places});
    context->saved_data["shape"] =
        std::vector<int64_t>{shape.kernel, shape.max_queries, shape.max_keys, shape.rows, shape.group};
    context->saved_data["flops"] = shape.flops;
    return shape.kernel == kFlash ? out : at::_unsafe_view(out, query.sizes());
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto kept = context->saved_data["shape"].toIntVector();
    Shape shape{kept[0], kept[1], kept[2], kept[3], kept[4], context->saved_data["flops"].toDouble()};
    Mark mark(shape, "backward", 2.5);
    auto saved = context->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    Copies copies{saved[9], saved[10], saved[11]};
    auto gradient = gradients[0].contiguous();
    at::Tensor dq, dk, dv;
    if (shape.kernel == kFlash) {
      std::tie(dq, dk, dv) = at::_flash_attention_backward(gradient, q, k, v, out, lse, saved[7], saved[8],
                                                           shape.query_bound(), shape.key_bound(), /*dropout_p=*/0.0,
                                                           /*is_causal=*/true, saved[5], saved[6]);
    } else {
      std::tie(dq, dk, dv, std::ignore) = at::_efficient_attention_backward(
          gradient.unsqueeze(0), q, k, v, /*bias=*/std::nullopt, out, saved[7], saved[8], shape.query_bound(),
          shape.key_bound(), lse, /*dropout_p=*/0.0, saved[5], saved[6], kCausalFromBottomRight,
          /*bias_requires_grad=*/false);
      dq = dq.squeeze(0);
    }
    return {dq, returned(dk, copies, shape), returned(dv, copies, shape), Variable(), Variable(), Variable(), Variable()};
  }
};

}  // namespace

extern "C" {

// Softmax attention with scale 1/sqrt(width): `[tokens, heads, width]` queries, `[tokens, kv heads, width]` keys and values.
// Returns a new tensor of the queries' shape, owned by the caller.
//
// In `runs`, `queries` and `keys` are the starts of runs, int32 `[runs + 1]`, from 0 to the number of queries and of keys. `gather` is
// the row of each key, int64; null if the keys are the rows in packed order. `starts` and `places`, both int32, are its inverse: the
// copies of row `r` are the keys `places[starts[r]]` to `places[starts[r + 1] - 1]`.
dyad_error dyad_varlen_attention(at::Tensor* query, at::Tensor* key, at::Tensor* value, const dyad_runs* runs,
                                 int64_t kernel, at::Tensor** out) {
  return guarded([&] {
    TORCH_CHECK(query->size(1) % key->size(1) == 0, "query heads must be a multiple of key heads");
    Shape shape{kernel, runs->max_queries, runs->max_keys, key->size(0), query->size(1) / key->size(1),
                4.0 * runs->pairs * static_cast<double>(query->size(1) * query->size(2))};
    Copies copies;
    if (runs->gather != nullptr) copies = {*runs->gather, *runs->starts, *runs->places};
    *out = new at::Tensor(VarlenAttention::apply(*query, *key, *value, *runs->queries, *runs->keys, copies, shape));
  });
}

}  // extern "C"
