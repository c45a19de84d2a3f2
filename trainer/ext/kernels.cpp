// Fused CPU kernels with their derivatives: RMSNorm, rotary positions, SwiGLU. One pass over memory where libtorch's
// operators take several. Float32 and bfloat16; all arithmetic is float32, rounded where the composed operators round.
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

#include "lanes.h"

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

struct Norm {
  int64_t columns;
  float eps;
};

template <typename T>
DYAD_INLINE void norm_rows(const T* x, const T* w, T* y, float* rstd, int64_t rows, Norm norm) {
  for (int64_t row = 0; row < rows; ++row, x += norm.columns, y += norm.columns) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < norm.columns; ++i) sum += widen(x[i]) * widen(x[i]);
    float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(norm.columns) + norm.eps);
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < norm.columns; ++i) narrow(rounded<T>(widen(x[i]) * scale) * widen(w[i]), y[i]);
  }
}

// With h = x·rstd and g = dy·w: dx = rstd (g - h mean(g h)), dw = sum over rows of dy·h.
template <typename T>
DYAD_INLINE void norm_rows_backward(const T* x, const T* w, const T* dy, const float* rstd, T* dx, float* dw, int64_t rows,
                                    Norm norm) {
  for (int64_t row = 0; row < rows; ++row, x += norm.columns, dy += norm.columns, dx += norm.columns) {
    float scale = rstd[row], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < norm.columns; ++i) sum += widen(dy[i]) * widen(w[i]) * widen(x[i]);
    float mean = sum * scale / static_cast<float>(norm.columns);
#pragma omp simd
    for (int64_t i = 0; i < norm.columns; ++i) {
      float h = widen(x[i]) * scale, g = widen(dy[i]);
      dw[i] += g * h;
      narrow(scale * (g * widen(w[i]) - h * mean), dx[i]);
    }
  }
}

// `[tokens, heads, 2 half]`: the pair (i, i + half) of every head turns by its token's angle, backwards where sign is -1.
struct Turn {
  int64_t heads;
  int64_t half;
  float sign;
};

template <typename T>
DYAD_INLINE void turn_rows(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, Turn turn) {
  int64_t width = 2 * turn.half;
  for (int64_t token = 0; token < tokens; ++token, cos += width, sin += width)
    for (int64_t head = 0; head < turn.heads; ++head, x += width, y += width)
#pragma omp simd
      for (int64_t i = 0; i < turn.half; ++i) {
        float a = widen(x[i]), b = widen(x[i + turn.half]), c = widen(cos[i]), s = turn.sign * widen(sin[i]);
        narrow(a * c - b * s, y[i]);
        narrow(b * c + a * s, y[i + turn.half]);
      }
}

template <typename T>
DYAD_INLINE void gate_values(const T* gate, const T* up, T* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float g = widen(gate[i]);
    narrow(rounded<T>(g * sigmoid(g)) * widen(up[i]), y[i]);
  }
}

template <typename T>
DYAD_INLINE void gate_values_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float g = widen(gate[i]), d = widen(dy[i]), s = sigmoid(g);
    narrow(d * rounded<T>(g * s), dup[i]);
    narrow(d * widen(up[i]) * s * (1.0f + g * (1.0f - s)), dgate[i]);
  }
}

DYAD_INLINE void add_values(float* total, const Bf16* part, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) total[i] += widen(part[i]);
}

}  // namespace

DYAD_CLONES void dyad_add(float* total, const Bf16* part, int64_t count) { add_values(total, part, count); }

// The instances that are cloned per instruction set; a template cannot be.
#define DYAD_INSTANCES(T)                                                                                               \
  DYAD_CLONES void dyad_norm(const T* x, const T* w, T* y, float* rstd, int64_t rows, Norm norm) {                      \
    norm_rows(x, w, y, rstd, rows, norm);                                                                               \
  }                                                                                                                     \
  DYAD_CLONES void dyad_norm_backward(const T* x, const T* w, const T* dy, const float* rstd, T* dx, float* dw,         \
                                      int64_t rows, Norm norm) {                                                        \
    norm_rows_backward(x, w, dy, rstd, dx, dw, rows, norm);                                                             \
  }                                                                                                                     \
  DYAD_CLONES void dyad_turn(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, Turn turn) {                 \
    turn_rows(x, cos, sin, y, tokens, turn);                                                                            \
  }                                                                                                                     \
  DYAD_CLONES void dyad_gate(const T* gate, const T* up, T* y, int64_t count) { gate_values(gate, up, y, count); }      \
  DYAD_CLONES void dyad_gate_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t count) {       \
    gate_values_backward(gate, up, dy, dgate, dup, count);                                                              \
  }
DYAD_INSTANCES(float)
DYAD_INSTANCES(Bf16)
#undef DYAD_INSTANCES

namespace {

std::vector<c10::IValue> seen(std::initializer_list<at::Tensor> tensors) {
  return std::vector<c10::IValue>(tensors.begin(), tensors.end());
}

// Enough work for a thread, in elements.
constexpr int64_t GRAIN = 1 << 15;

int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, GRAIN / columns); }

struct RmsNorm : public Function<RmsNorm> {
  static Variable forward(AutogradContext* context, const Variable& x, const Variable& weight, double eps) {
    auto input = x.contiguous(), y = at::empty_like(input);
    Norm norm{input.size(-1), static_cast<float>(eps)};
    int64_t rows = input.numel() / norm.columns;
    auto rstd = at::empty({rows}, input.options().dtype(at::kFloat));
    RECORD_FUNCTION("dyad::rms_norm", seen({input, weight}));
    by_kind(input, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      at::parallel_for(0, rows, rows_per_task(norm.columns), [&](int64_t begin, int64_t end) {
        int64_t at = begin * norm.columns;
        dyad_norm(data<T>(input) + at, data<T>(weight), data<T>(y) + at, data<float>(rstd) + begin, end - begin, norm);
      });
    });
    context->save_for_backward({input, weight, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto &x = saved[0], &weight = saved[1], &rstd = saved[2];
    auto dy = gradients[0].contiguous();
    auto dx = at::empty_like(x);
    Norm norm{x.size(-1), 0.0f};
    int64_t rows = x.numel() / norm.columns;
    // As many parts as threads, each with a sum of its own: the result depends on nothing but their number.
    int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), rows)), each = (rows + parts - 1) / parts;
    auto dw = at::zeros({parts, norm.columns}, rstd.options());
    RECORD_FUNCTION("dyad::rms_norm_backward", seen({x, weight, dy}));
    by_kind(x, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          int64_t first = part * each, count = std::min(each, rows - first), at = first * norm.columns;
          if (count > 0)
            dyad_norm_backward(data<T>(x) + at, data<T>(weight), data<T>(dy) + at, data<float>(rstd) + first,
                               data<T>(dx) + at, data<float>(dw) + part * norm.columns, count, norm);
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
      dyad_turn(data<T>(input) + at, data<T>(cos) + angle, data<T>(sin) + angle, data<T>(y) + at, end - begin, turn);
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
        dyad_gate(data<T>(g) + begin, data<T>(u) + begin, data<T>(y) + begin, end - begin);
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
        dyad_gate_backward(data<T>(g) + begin, data<T>(u) + begin, data<T>(dy) + begin, data<T>(dg) + begin,
                           data<T>(du) + begin, end - begin);
      });
    });
    return {dg, du};
  }
};

}  // namespace

extern "C" {

// Each returns a new tensor owned by the caller. CPU tensors of one kind, float32 or bfloat16.

// `x / sqrt(mean(x²) + eps) · weight` over the last dimension.
dyad_error dyad_rms_norm(at::Tensor* x, at::Tensor* weight, double eps, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(RmsNorm::apply(*x, *weight, eps)); });
}

// Rotates `[tokens, heads, width]` by angles whose cosines and sines are `[tokens, 1, width]`, contiguous, both halves alike.
dyad_error dyad_rotate(at::Tensor* x, at::Tensor* cos, at::Tensor* sin, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(Rotate::apply(*x, *cos, *sin)); });
}

// Adds a bfloat16 tensor to a float32 one of the same size, in place; both contiguous. Libtorch's own addition makes a
// widened copy first.
dyad_error dyad_accumulate(at::Tensor* total, at::Tensor* part) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::accumulate", seen({*total, *part}));
    at::parallel_for(0, total->numel(), GRAIN, [&](int64_t begin, int64_t end) {
      dyad_add(data<float>(*total) + begin, data<Bf16>(*part) + begin, end - begin);
    });
  });
}

// Threads that a kernel's loop is divided between.
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

// `silu(gate) · up`.
dyad_error dyad_swiglu(at::Tensor* gate, at::Tensor* up, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(SwiGlu::apply(*gate, *up)); });
}

}  // extern "C"
