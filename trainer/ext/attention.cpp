// Attention over packed segments on the CPU: a prompt, then branches that each see the prompt and themselves. Every block
// that somebody sees is computed once, no other, by libtorch's flash kernel; a branch's two blocks (the prompt, itself) are
// merged by their log-sum-exps, so that no mask and no copy of the prompt's keys is ever made. Bfloat16 inputs are widened:
// the kernel's blocks are too small for bfloat16 products to pay (half the speed, measured on AVX-512 without AMX).
#include "bridge.h"

#include <tuple>

#include <ATen/TensorOperators.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

// A run of queries and the keys it sees: all of them, or causally.
struct Block {
  int64_t query, queries, key, keys;
  bool causal;
};

// First and, where there is one, second block of a run of queries.
struct Run {
  Block first;
  Block second;
  bool merged;
};

// Segments come as [start, prompt, branch count, branch lengths…] one after the other.
std::vector<Run> runs(const int64_t* layout, size_t count) {
  std::vector<Run> list;
  for (size_t i = 0; i < count;) {
    int64_t start = layout[i], prompt = layout[i + 1], branches = layout[i + 2], at = start + prompt;
    i += 3;
    for (int64_t branch = 0; branch < branches; ++branch) {
      int64_t length = layout[i++];
      if (branch == 0)
        // The first branch simply goes on from the prompt.
        list.push_back({{start, prompt + length, start, prompt + length, true}, {}, false});
      else if (prompt == 0)
        list.push_back({{at, length, at, length, true}, {}, false});
      else
        list.push_back({{at, length, start, prompt, false}, {at, length, at, length, true}, true});
      at += length;
    }
    if (branches == 0) list.push_back({{start, prompt, start, prompt, true}, {}, false});
  }
  return list;
}

// `[tokens, heads, width]` -> `[kv heads, group, length, width]`, with the group repeated for keys and values. A view.
at::Tensor queries_of(const at::Tensor& x, int64_t start, int64_t length, int64_t kv_heads) {
  return x.narrow(0, start, length).view({length, kv_heads, x.size(1) / kv_heads, x.size(2)}).permute({1, 2, 0, 3});
}
at::Tensor keys_of(const at::Tensor& x, int64_t start, int64_t length, int64_t group) {
  return x.narrow(0, start, length).unsqueeze(2).expand({length, x.size(1), group, x.size(2)}).permute({1, 2, 0, 3});
}
// `[tokens, heads]` log-sum-exps -> `[kv heads, group, length]`.
at::Tensor sums_of(const at::Tensor& lse, int64_t start, int64_t length, int64_t kv_heads) {
  return lse.narrow(0, start, length).view({length, kv_heads, lse.size(1) / kv_heads}).permute({1, 2, 0});
}

at::Tensor wide(const at::Tensor& x) { return x.contiguous().to(at::kFloat); }

struct Shape {
  int64_t kv_heads, group;
  explicit Shape(const at::Tensor& q, const at::Tensor& k) : kv_heads(k.size(1)), group(q.size(1) / k.size(1)) {}
};

std::tuple<at::Tensor, at::Tensor> attend(const variable_list& qkv, const Block& block, Shape shape) {
  return at::_scaled_dot_product_flash_attention_for_cpu(
      queries_of(qkv[0], block.query, block.queries, shape.kv_heads), keys_of(qkv[1], block.key, block.keys, shape.group),
      keys_of(qkv[2], block.key, block.keys, shape.group), 0.0, block.causal);
}

struct SegmentedAttention : public Function<SegmentedAttention> {
  static Variable forward(AutogradContext* context, const Variable& query, const Variable& key, const Variable& value,
                          std::vector<int64_t> layout) {
    variable_list qkv{wide(query), wide(key), wide(value)};
    Shape shape(qkv[0], qkv[1]);
    auto out = at::empty_like(qkv[0]);
    auto lse = at::empty({out.size(0), out.size(1)}, out.options().dtype(at::kFloat));
    for (const auto& run : runs(layout.data(), layout.size())) {
      auto [o, l] = attend(qkv, run.first, shape);
      if (run.merged) {
        auto [own, own_sum] = attend(qkv, run.second, shape);
        auto total = at::logaddexp(l, own_sum);
        o = o * (l - total).exp_().unsqueeze(-1) + own * (own_sum - total).exp_().unsqueeze(-1);
        l = total;
      }
      queries_of(out, run.first.query, run.first.queries, shape.kv_heads).copy_(o);
      sums_of(lse, run.first.query, run.first.queries, shape.kv_heads).copy_(l);
    }
    context->save_for_backward({qkv[0], qkv[1], qkv[2], out, lse});
    context->saved_data["layout"] = layout;
    return out.to(query.scalar_type());
  }

  // The flash kernel derives a block's probabilities from the log-sum-exp that it is given; given that of the whole row,
  // each block's gradients are its share of the whole's.
  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    variable_list qkv(saved.begin(), saved.begin() + 3);
    auto layout = context->saved_data["layout"].toIntVector();
    Shape shape(qkv[0], qkv[1]);
    auto kind = gradients[0].scalar_type();
    auto grad = wide(gradients[0]);
    auto dq = at::empty_like(qkv[0]), dk = at::zeros_like(qkv[1]), dv = at::zeros_like(qkv[2]);
    for (const auto& run : runs(layout.data(), layout.size())) {
      auto into = queries_of(dq, run.first.query, run.first.queries, shape.kv_heads);
      into.copy_(block_backward(qkv, saved, grad, run.first, shape, dk, dv));
      if (run.merged) into.add_(block_backward(qkv, saved, grad, run.second, shape, dk, dv));
    }
    return {dq.to(kind), dk.to(kind), dv.to(kind), Variable()};
  }

  static at::Tensor block_backward(const variable_list& qkv, const variable_list& saved, const at::Tensor& grad,
                                   const Block& block, Shape shape, const at::Tensor& dk, const at::Tensor& dv) {
    auto rows = [&](const at::Tensor& x) { return queries_of(x, block.query, block.queries, shape.kv_heads); };
    auto keys = [&](const at::Tensor& x) { return keys_of(x, block.key, block.keys, shape.group); };
    auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        rows(grad), rows(qkv[0]), keys(qkv[1]), keys(qkv[2]), rows(saved[3]),
        sums_of(saved[4], block.query, block.queries, shape.kv_heads), 0.0, block.causal);
    auto add = [&](const at::Tensor& total, const at::Tensor& part) {
      auto summed = shape.group == 1 ? part.squeeze(1) : part.sum(1);
      total.narrow(0, block.key, block.keys).add_(summed.transpose(0, 1));
    };
    add(dk, k);
    add(dv, v);
    return q;
  }
};

}  // namespace

extern "C" {

// Softmax attention with scale 1/sqrt(width). `[tokens, heads, width]` queries, `[tokens, kv heads, width]` keys and values;
// returns a new tensor of the queries' shape, owned by the caller. CPU tensors of one kind, float32 or bfloat16.
dyad_error dyad_segmented_attention(at::Tensor* query, at::Tensor* key, at::Tensor* value, const int64_t* layout,
                                    size_t count, at::Tensor** out) {
  return guarded([&] {
    *out = new at::Tensor(
        SegmentedAttention::apply(*query, *key, *value, std::vector<int64_t>(layout, layout + count)));
  });
}

}  // extern "C"
