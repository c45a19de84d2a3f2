// AdamW on the CPU in one pass over memory. While the values are in cache it also scales and clears the gradients and writes the
// weights in bfloat16.
#include "bridge.h"

#include <algorithm>
#include <cmath>

#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include "tensors.h"

namespace {

// Factors of a step, as in torch's AdamW: m += mean (g - m), v = kept v + square g², p = decay p - rate m / (√v root + eps).
struct Factors {
  float scale, mean, kept, square, decay, rate, root, eps;

  explicit Factors(const double* hyper) {
    double rate_ = hyper[0], beta1 = hyper[1], beta2 = hyper[2], weight_decay = hyper[3], count = hyper[5];
    scale = static_cast<float>(hyper[6]);
    mean = static_cast<float>(1.0 - beta1);
    kept = static_cast<float>(beta2);
    square = static_cast<float>(1.0 - beta2);
    decay = static_cast<float>(1.0 - rate_ * weight_decay);
    rate = static_cast<float>(rate_ / (1.0 - std::pow(beta1, count)));
    root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, count)));
    eps = static_cast<float>(hyper[4]);
  }
};

DYAD_INLINE void step_values(float* p, const float* g, float* m, float* v, int64_t count, const Factors& by) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float gradient = g[i] * by.scale;
    m[i] += by.mean * (gradient - m[i]);
    v[i] = by.kept * v[i] + by.square * gradient * gradient;
    p[i] = by.decay * p[i] - by.rate * m[i] / (__builtin_sqrtf(v[i]) * by.root + by.eps);
  }
}

DYAD_INLINE void publish_values(const float* p, Bf16* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(p[i], to[i]);
}

// Values of each array per chunk: a chunk of all arrays stays in the L1 cache between two loops.
constexpr int64_t CHUNK = 2048;
// Smallest share of work for a thread, in values.
constexpr int64_t GRAIN = 1 << 15;

}  // namespace

DYAD_CLONES void dyad_step(float* p, const float* g, float* m, float* v, int64_t count, const Factors& by) {
  step_values(p, g, m, v, count, by);
}
DYAD_CLONES void dyad_publish(const float* p, Bf16* to, int64_t count) { publish_values(p, to, count); }

// One AdamW step (Loshchilov & Hutter 2019, arXiv 1711.05101) of flat float32 parameters on the CPU, with their gradient times
// `scale`. All tensors are contiguous and of the same length. `published` (bfloat16) receives the new parameters; it may be null.
// `clear` sets the gradient to zero.
extern "C" dyad_error dyad_adamw(at::Tensor* parameter, at::Tensor* gradient, at::Tensor* exp_avg, at::Tensor* exp_avg_sq,
                                 at::Tensor* published, bool clear,
                                 const double* hyper /* lr, beta1, beta2, weight_decay, eps, step, scale */) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::adamw", std::vector<c10::IValue>{*parameter});
    Factors by(hyper);
    auto *p = data<float>(*parameter), *g = data<float>(*gradient), *m = data<float>(*exp_avg), *v = data<float>(*exp_avg_sq);
    Bf16* narrow = published == nullptr ? nullptr : data<Bf16>(*published);
    at::parallel_for(0, parameter->numel(), GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; at += CHUNK) {
        int64_t count = std::min(CHUNK, end - at);
        dyad_step(p + at, g + at, m + at, v + at, count, by);
        if (narrow != nullptr) dyad_publish(p + at, narrow + at, count);
        if (clear) std::fill_n(g + at, count, 0.0f);
      }
    });
  });
}
