// Fused CPU kernels with their derivatives: RMSNorm, rotary positions, SwiGLU. They pass over memory once, where libtorch's
// operators do so several times. Values are float32 or bfloat16; arithmetic is float32 and rounds where libtorch's operators round.
#include "bridge.h"

#include <algorithm>
#include <mutex>
#include <set>
#include <thread>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "rows.h"
#include "tensors.h"

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;
using dyad::Norm;
using dyad::Turn;
using dyad::loops;

namespace {

std::vector<c10::IValue> seen(std::initializer_list<at::Tensor> tensors) {
  return std::vector<c10::IValue>(tensors.begin(), tensors.end());
}

// Smallest share of work for a thread, in elements.
constexpr int64_t GRAIN = 1 << 15;

int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, GRAIN / columns); }

// Also returns its input, for the residual connection: then the backward pass adds the gradients of both outputs in one pass.
struct RmsNorm : public Function<RmsNorm> {
  static variable_list forward(AutogradContext* context, const Variable& x, const Variable& weight, double eps) {
    auto input = x.contiguous(), y = at::empty_like(input);
    Norm norm{input.size(-1), static_cast<float>(eps)};
    int64_t rows = input.numel() / norm.columns;
    auto rstd = at::empty({rows}, input.options().dtype(at::kFloat));
    RECORD_FUNCTION("dyad::rms_norm", seen({input, weight}));
    by_kind(input, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      at::parallel_for(0, rows, rows_per_task(norm.columns), [&](int64_t begin, int64_t end) {
        int64_t at = begin * norm.columns;
        loops<T>().norm(data<T>(input) + at, data<T>(weight), data<T>(y) + at, data<float>(rstd) + begin, end - begin, norm);
      });
    });
    context->save_for_backward({input, weight, rstd});
    return {y, x};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto &x = saved[0], &weight = saved[1], &rstd = saved[2];
    if (!gradients[0].defined()) return {gradients[1], Variable(), Variable()};
    auto dy = gradients[0].contiguous(), beside = gradients[1].defined() ? gradients[1].contiguous() : at::Tensor();
    auto dx = at::empty_like(x);
    Norm norm{x.size(-1), 0.0f};
    int64_t rows = x.numel() / norm.columns;
    // One part per thread, each with its own sum, so that the result depends only on the number of threads.
    int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows)), each = (rows + parts - 1) / parts;
    auto dw = at::zeros({parts, norm.columns}, rstd.options());
    RECORD_FUNCTION("dyad::rms_norm_backward", seen({x, weight, dy}));
    by_kind(x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          int64_t first = part * each, count = std::min(each, rows - first), at = first * norm.columns;
          if (count <= 0) continue;
          dyad::NormBackward<T> of{data<T>(x) + at,
                                   data<T>(weight),
                                   data<T>(dy) + at,
                                   beside.defined() ? data<T>(beside) + at : nullptr,
                                   data<float>(rstd) + first,
                                   data<T>(dx) + at};
          loops<T>().norm_backward(of, data<float>(dw) + part * norm.columns, count, norm);
        }
      });
    });
    return {dx, context->needs_input_grad(1) ? dw.sum(0).to(weight.scalar_type()) : Variable(), Variable()};
  }
};

at::Tensor turned(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, float sign) {
  auto input = x.contiguous(), y = at::empty_like(input);
  Turn turn{input.size(1), input.size(2) / 2, sign};
  int64_t width = turn.heads * 2 * turn.half;
  RECORD_FUNCTION("dyad::rotary", seen({input}));
  by_kind(input, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    at::parallel_for(0, input.size(0), rows_per_task(width), [&](int64_t begin, int64_t end) {
      int64_t at = begin * width, angle = begin * 2 * turn.half;
      loops<T>().turn(data<T>(input) + at, data<T>(cos) + angle, data<T>(sin) + angle, data<T>(y) + at, end - begin, turn);
    });
  });
  return y;
}

struct Rotate : public Function<Rotate> {
  static Variable forward(AutogradContext* context, const Variable& x, const Variable& cos, const Variable& sin) {
    context->save_for_backward({cos, sin});
    return turned(x, cos, sin, 1.0f);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    return {turned(gradients[0], saved[0], saved[1], -1.0f), Variable(), Variable()};
  }
};

struct SwiGlu : public Function<SwiGlu> {
  static Variable forward(AutogradContext* context, const Variable& gate, const Variable& up) {
    auto g = gate.contiguous(), u = up.contiguous(), y = at::empty_like(g);
    RECORD_FUNCTION("dyad::swiglu", seen({g, u}));
    by_kind(g, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      at::parallel_for(0, g.numel(), GRAIN, [&](int64_t begin, int64_t end) {
        loops<T>().gate(data<T>(g) + begin, data<T>(u) + begin, data<T>(y) + begin, end - begin);
      });
    });
    context->save_for_backward({g, u});
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto &g = saved[0], &u = saved[1];
    auto dy = gradients[0].contiguous();
    auto dg = at::empty_like(g), du = at::empty_like(u);
    RECORD_FUNCTION("dyad::swiglu_backward", seen({g, u, dy}));
    by_kind(g, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      at::parallel_for(0, g.numel(), GRAIN, [&](int64_t begin, int64_t end) {
        loops<T>().gate_backward(data<T>(g) + begin, data<T>(u) + begin, data<T>(dy) + begin, data<T>(dg) + begin,
                                 data<T>(du) + begin, end - begin);
      });
    });
    return {dg, du};
  }
};

}  // namespace

extern "C" {

// Operators return new tensors owned by the caller. Their inputs are CPU tensors of one kind, float32 or bfloat16.

// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, and `x` again for the residual connection.
dyad_error dyad_rms_norm(at::Tensor* x, at::Tensor* weight, double eps, at::Tensor** y, at::Tensor** beside) {
  return guarded([&] {
    auto outputs = RmsNorm::apply(*x, *weight, eps);
    *y = new at::Tensor(std::move(outputs[0]));
    *beside = new at::Tensor(std::move(outputs[1]));
  });
}

// Rotates `[tokens, heads, width]` by angles whose cosines and sines are contiguous `[tokens, 1, width]` with two equal halves.
dyad_error dyad_rotate(at::Tensor* x, at::Tensor* cos, at::Tensor* sin, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(Rotate::apply(*x, *cos, *sin)); });
}

// Adds a bfloat16 tensor to a float32 tensor of the same size, in place; both are contiguous. libtorch's addition would make a
// float32 copy first.
dyad_error dyad_accumulate(at::Tensor* total, at::Tensor* part) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::accumulate", seen({*total, *part}));
    at::parallel_for(0, total->numel(), GRAIN, [&](int64_t begin, int64_t end) {
      loops<Bf16>().add(data<float>(*total) + begin, data<Bf16>(*part) + begin, end - begin);
    });
  });
}

// Number of threads that share a kernel's loop.
dyad_error dyad_kernel_threads(size_t* threads) {
  return guarded([&] {
    std::mutex mutex;
    std::set<std::thread::id> seen;
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      std::lock_guard<std::mutex> lock(mutex);
      seen.insert(std::this_thread::get_id());
    });
    *threads = seen.size();
  });
}

// Float32 values per register of the instruction set whose loops were chosen.
int64_t dyad_kernel_lanes() { return dyad::all_loops().lanes; }

// `silu(gate) · up`.
dyad_error dyad_swiglu(at::Tensor* gate, at::Tensor* up, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(SwiGlu::apply(*gate, *up)); });
}

}  // extern "C"
