// For tests only: plain CPU kernels for operators that libtorch has on CUDA devices only, registered with the dispatcher, so that
// the code that calls them runs on CPUs. They reject the inputs that the CUDA kernels reject.
#include "bridge.h"

#include <array>
#include <limits>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

using std::optional;

struct Run {
  int64_t query, queries, key, keys;
};

std::vector<Run> runs_of(const at::Tensor& cu_q, const at::Tensor& cu_k, int64_t max_q, int64_t max_k, int64_t total_q,
                         int64_t total_k) {
  for (const auto& cu : {cu_q, cu_k})
    TORCH_CHECK(cu.scalar_type() == at::kInt && cu.dim() == 1 && cu.is_contiguous(), "cu_seqlens must be int32, contiguous");
  TORCH_CHECK(cu_q.size(0) == cu_k.size(0) && cu_q.size(0) > 1, "as many runs of queries as of keys, at least one");
  auto q = cu_q.data_ptr<int32_t>(), k = cu_k.data_ptr<int32_t>();
  std::vector<Run> runs;
  for (int64_t i = 0; i + 1 < cu_q.size(0); ++i) {
    runs.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
    TORCH_CHECK(runs[i].queries > 0 && runs[i].queries <= max_q && runs[i].keys <= max_k, "a run is empty or too long");
    TORCH_CHECK(runs[i].keys >= runs[i].queries, "a query sees no key");
  }
  TORCH_CHECK(q[0] == 0 && k[0] == 0 && q[runs.size()] == total_q && k[runs.size()] == total_k, "runs cover all rows");
  return runs;
}

// `[rows, heads, width]` of a run -> `[heads, length, width]`, float64, heads repeated.
at::Tensor part(const at::Tensor& x, int64_t start, int64_t length, int64_t group) {
  return x.narrow(0, start, length).transpose(0, 1).repeat_interleave(group, 0).to(at::kDouble);
}

at::Tensor scores(const at::Tensor& q, const at::Tensor& k) {
  auto hidden = at::ones({q.size(1), k.size(1)}, at::kBool).triu(k.size(1) - q.size(1) + 1);
  auto products = at::matmul(q, k.transpose(1, 2)) / std::sqrt(static_cast<double>(q.size(2)));
  return products.masked_fill(hidden, -std::numeric_limits<double>::infinity());
}

// Output and log-sum-exps `[heads, queries]` of all runs.
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                          const std::vector<Run>& runs) {
  auto group = q.size(1) / k.size(1);
  auto out = at::empty_like(q);
  auto lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  for (const auto& run : runs) {
    auto s = scores(part(q, run.query, run.queries, 1), part(k, run.key, run.keys, group));
    out.narrow(0, run.query, run.queries).copy_(at::matmul(s.softmax(-1), part(v, run.key, run.keys, group)).transpose(0, 1));
    lse.narrow(1, run.query, run.queries).copy_(s.logsumexp(-1));
  }
  return {out, lse};
}

// Uses the saved log-sum-exps, as the CUDA kernels do, so that a wrong one gives wrong gradients.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attend_backward(const at::Tensor& grad, const at::Tensor& q,
                                                               const at::Tensor& k, const at::Tensor& v,
                                                               const at::Tensor& out, const at::Tensor& lse,
                                                               const std::vector<Run>& runs) {
  auto kv_heads = k.size(1), group = q.size(1) / kv_heads;
  auto scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  auto dq = at::empty_like(q), dk = at::empty_like(k), dv = at::empty_like(v);
  auto store = [&](at::Tensor& into, int64_t start, const at::Tensor& heads) {
    auto folded = heads.view({into.size(1), -1, heads.size(1), heads.size(2)}).sum(1);
    into.narrow(0, start, heads.size(1)).copy_(folded.transpose(0, 1));
  };
  for (const auto& run : runs) {
    auto queries = part(q, run.query, run.queries, 1), g = part(grad, run.query, run.queries, 1);
    auto keys = part(k, run.key, run.keys, group), values = part(v, run.key, run.keys, group);
    auto p = (scores(queries, keys) - lse.narrow(1, run.query, run.queries).to(at::kDouble).unsqueeze(-1)).exp();
    auto delta = (g * part(out, run.query, run.queries, 1)).sum(-1, true);
    auto ds = p * (at::matmul(g, values.transpose(1, 2)) - delta) * scale;
    store(dq, run.query, at::matmul(ds, keys));
    store(dk, run.key, at::matmul(ds.transpose(1, 2), queries));
    store(dv, run.key, at::matmul(p.transpose(1, 2), g));
  }
  return {dq, dk, dv};
}

void check_flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16, "FlashAttention only supports fp16 and bf16");
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "one kind");
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.sizes() == v.sizes() && q.size(2) == k.size(2), "shapes");
  TORCH_CHECK(q.size(2) % 8 == 0 && q.size(2) <= 256, "head width must be a multiple of 8 up to 256");
  TORCH_CHECK(q.size(1) % k.size(1) == 0, "heads");
  TORCH_CHECK(q.stride(-1) == 1 && k.stride(-1) == 1 && v.stride(-1) == 1, "contiguous last dimension");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> flash_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const optional<at::Tensor>& cu_q,
    const optional<at::Tensor>& cu_k, int64_t max_q, int64_t max_k, double dropout, bool causal, bool debug,
    optional<double> scale, optional<int64_t> left, optional<int64_t> right, const optional<at::Tensor>&,
    const optional<at::Tensor>&) {
  check_flash(q, k, v);
  TORCH_CHECK(max_q > 1, "a bound of one query makes FlashAttention-2 regroup heads");
  TORCH_CHECK(dropout == 0.0 && causal && !debug && !scale && !left && !right, "not what the trainer asks for");
  auto [out, lse] = attend(q, k, v, runs_of(*cu_q, *cu_k, max_q, max_k, q.size(0), k.size(0)));
  auto state = [](at::IntArrayRef sizes) { return at::zeros(sizes, at::kLong).view(at::kUInt64); };
  return {out, lse, state({2}), at::empty({}, at::kUInt64), at::empty({0}, q.options())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_q, const at::Tensor& cu_k, int64_t max_q, int64_t max_k, double dropout,
    bool causal, const at::Tensor& state, const at::Tensor& unused, optional<double>, optional<int64_t>, optional<int64_t>) {
  check_flash(q, k, v);
  TORCH_CHECK(grad.is_contiguous() && grad.sizes() == q.sizes() && out.sizes() == q.sizes(), "gradient");
  TORCH_CHECK(lse.sizes() == at::IntArrayRef({q.size(1), q.size(0)}), "log-sum-exps");
  TORCH_CHECK(state.scalar_type() == at::kUInt64 && unused.scalar_type() == at::kUInt64 && causal && dropout == 0.0);
  return attend_backward(grad, q, k, v, out, lse, runs_of(cu_q, cu_k, max_q, max_k, q.size(0), k.size(0)));
}

void check_efficient(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t mask) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == 1 && k.size(0) == 1, "one batch");
  TORCH_CHECK(q.size(2) == k.size(2) && q.size(3) == k.size(3), "as many key heads as query heads");
  TORCH_CHECK(q.size(3) * q.element_size() % 16 == 0, "heads of 16 bytes' multiples");
  TORCH_CHECK(q.stride(-1) == 1 && k.stride(-1) == 1 && v.stride(-1) == 1, "contiguous last dimension");
  TORCH_CHECK(mask == 2, "bottom-right causal");
}

// The kernel pads each run's log-sum-exps: `[runs, heads, longest run, up to a multiple of 32]`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt> efficient_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const optional<at::Tensor>& bias,
    const optional<at::Tensor>& cu_q, const optional<at::Tensor>& cu_k, optional<int64_t> max_q, optional<int64_t> max_k,
    double dropout, int64_t mask, bool with_lse, optional<double>, const optional<at::Tensor>&, optional<int64_t>) {
  check_efficient(q, k, v, mask);
  TORCH_CHECK(!bias && dropout == 0.0 && with_lse, "not what the trainer asks for");
  TORCH_CHECK(*max_q <= q.size(1) && *max_k <= k.size(1), "invalid max_seqlen");
  auto runs = runs_of(*cu_q, *cu_k, *max_q, *max_k, q.size(1), k.size(1));
  auto [out, flat] = attend(q.squeeze(0), k.squeeze(0), v.squeeze(0), runs);
  auto lse = at::full({static_cast<int64_t>(runs.size()), q.size(2), (*max_q + 31) / 32 * 32},
                      std::numeric_limits<float>::infinity(), q.options().dtype(at::kFloat));
  for (size_t i = 0; i < runs.size(); ++i)
    lse[i].narrow(1, 0, runs[i].queries).copy_(flat.narrow(1, runs[i].query, runs[i].queries));
  return {out.unsqueeze(0), lse, at::zeros({}, at::kLong), at::zeros({}, at::kLong), c10::SymInt(*max_q), c10::SymInt(*max_k)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const optional<at::Tensor>& bias,
    const at::Tensor& out, const optional<at::Tensor>& cu_q, const optional<at::Tensor>& cu_k, int64_t max_q, int64_t max_k,
    const at::Tensor& lse, double dropout, const at::Tensor&, const at::Tensor&, int64_t mask, bool bias_grad,
    optional<double>, optional<int64_t>, optional<int64_t>, bool) {
  check_efficient(q, k, v, mask);
  TORCH_CHECK(!(bias && bias->defined()) && !bias_grad && dropout == 0.0 && grad.sizes() == q.sizes());
  TORCH_CHECK(max_q <= q.size(1) && max_k <= k.size(1), "invalid max_seqlen");
  auto runs = runs_of(*cu_q, *cu_k, max_q, max_k, q.size(1), k.size(1));
  auto flat = at::empty({q.size(2), q.size(1)}, lse.options());
  for (size_t i = 0; i < runs.size(); ++i)
    flat.narrow(1, runs[i].query, runs[i].queries).copy_(lse[i].narrow(1, 0, runs[i].queries));
  auto [dq, dk, dv] =
      attend_backward(grad.squeeze(0), q.squeeze(0), k.squeeze(0), v.squeeze(0), out.squeeze(0), flat, runs);
  return {dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0), at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_forward(const at::Tensor& x, at::IntArrayRef shape,
                                                    const optional<at::Tensor>& weight, optional<double> eps) {
  TORCH_CHECK(shape.size() == 1 && shape[0] == x.size(-1) && weight && eps, "not what the trainer asks for");
  auto wide = x.to(at::kDouble);
  auto rstd = (wide.square().mean(-1, true) + *eps).rsqrt();
  return {(wide * rstd * weight->to(at::kDouble)).to(x.scalar_type()), rstd.to(at::kFloat)};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, at::IntArrayRef,
                                                     const at::Tensor& rstd, const optional<at::Tensor>& weight,
                                                     std::array<bool, 2>) {
  auto g = grad.to(at::kDouble), r = rstd.to(at::kDouble), normed = x.to(at::kDouble) * r;
  auto scaled = g * weight->to(at::kDouble);
  auto dx = r * (scaled - normed * (scaled * normed).mean(-1, true));
  return {dx.to(x.scalar_type()), (g * normed).sum(0).to(weight->scalar_type())};
}

}  // namespace

extern "C" {

// Registers the kernels once, for the rest of the process.
dyad_error dyad_fake_gpu() {
  return guarded([] {
    static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
    static bool once = [] {
      library.impl("_flash_attention_forward", flash_forward);
      library.impl("_flash_attention_backward", flash_backward);
      library.impl("_efficient_attention_forward", efficient_forward);
      library.impl("_efficient_attention_backward", efficient_backward);
      library.impl("_fused_rms_norm", rms_norm_forward);
      library.impl("_fused_rms_norm_backward", rms_norm_backward);
      return true;
    }();
    (void)once;
  });
}

}  // extern "C"
