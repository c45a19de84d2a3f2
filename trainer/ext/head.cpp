// The LM head's work on a tile of logits on the CPU, a row at a time while it is in cache. Float32 and bfloat16 logits; all
// arithmetic is float32, but a log-probability is float64: of a long sequence's sum, float32 would leave four digits.
#include "bridge.h"
#include "gpu.h"

#include <vector>

#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include "lanes.h"

namespace {

template <typename T>
DYAD_INLINE float row_max(const T* z, int64_t columns) {
  float max = widen(z[0]);
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < columns; ++i) max = widen(z[i]) > max ? widen(z[i]) : max;
  return max;
}

// What passes over a row of logits z add up.
struct Sums {
  // Of e^(z - max), and of the same times what z - max is above the reference's. A NaN among the logits stays one.
  float weights, above;
};

// The terms e^(z - max) go to `terms` where they are kept.
template <bool KEEP, bool COMPARE, typename T>
DYAD_INLINE Sums add_up(const T* z, float max, const T* r, float reference_max, float* terms, int64_t columns) {
  float weights = 0.0f, above = 0.0f;
#pragma omp simd reduction(+ : weights, above)
  for (int64_t i = 0; i < columns; ++i) {
    float logit = widen(z[i]) - max, term = exponential_or_none(logit);
    weights += term;
    if constexpr (COMPARE) above += term * (logit - (widen(r[i]) - reference_max));
    if constexpr (KEEP) terms[i] = term;
  }
  return {weights, above};
}

DYAD_INLINE double log_of(float sum) { return __builtin_log(static_cast<double>(sum)); }

// softmax(z) - onehot(target).
template <typename T>
DYAD_INLINE void to_errors(T* z, const float* terms, float scale, int64_t target, int64_t columns) {
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) narrow(scale * terms[i], z[i]);
  narrow(scale * terms[target] - 1.0f, z[target]);
}

template <typename T>
struct Tile {
  // Logits in, errors out where they are kept. `[rows, columns]`
  T* policy;
  // Null without a reference. `[rows, columns]`
  const T* reference;
  const int64_t* targets;
  double* logps;
  double* reference_logps;
  float* kl;
  int64_t columns;
};

// `terms` is a row's room.
template <bool KEEP, bool COMPARE, typename T>
DYAD_INLINE void score_row(const Tile<T>& tile, int64_t row, float* terms) {
  T* z = tile.policy + row * tile.columns;
  const T* r = COMPARE ? tile.reference + row * tile.columns : nullptr;
  int64_t target = tile.targets[row];
  float max = row_max(z, tile.columns), reference_max = COMPARE ? row_max(r, tile.columns) : 0.0f;
  Sums sums = add_up<KEEP, COMPARE>(z, max, r, reference_max, terms, tile.columns);
  double log_sum = log_of(sums.weights);
  tile.logps[row] = widen(z[target]) - (max + log_sum);
  if constexpr (COMPARE) {
    double reference_log_sum = log_of(add_up<false, false>(r, reference_max, r, reference_max, terms, tile.columns).weights);
    tile.reference_logps[row] = widen(r[target]) - (reference_max + reference_log_sum);
    // The mean of log p - log q under p; without the maxima, so that little is subtracted from little.
    tile.kl[row] = static_cast<float>(static_cast<double>(sums.above / sums.weights) - (log_sum - reference_log_sum));
  }
  if constexpr (KEEP) to_errors(z, terms, 1.0f / sums.weights, target, tile.columns);
}

template <bool KEEP, typename T>
DYAD_INLINE void score_rows(const Tile<T>& tile, int64_t begin, int64_t end, float* terms) {
  for (int64_t row = begin; row < end; ++row)
    if (tile.reference == nullptr)
      score_row<KEEP, false>(tile, row, terms);
    else
      score_row<KEEP, true>(tile, row, terms);
}

}  // namespace

#define DYAD_INSTANCES(T)                                                                            \
  DYAD_CLONES void dyad_score(const Tile<T>& tile, int64_t begin, int64_t end) {                     \
    score_rows<false>(tile, begin, end, nullptr);                                                    \
  }                                                                                                  \
  DYAD_CLONES void dyad_score_and_keep(const Tile<T>& tile, int64_t begin, int64_t end, float* terms) { \
    score_rows<true>(tile, begin, end, terms);                                                       \
  }
DYAD_INSTANCES(float)
DYAD_INSTANCES(Bf16)
#undef DYAD_INSTANCES

// Null where there is no tensor.
template <typename T>
static T* data_or_null(at::Tensor* tensor) {
  return tensor == nullptr ? nullptr : data<T>(*tensor);
}

extern "C" {

// Turns each row of the policy's logits into the log-probability of its target and, where `keep` is set, into what each
// probability is above what was to be (softmax - onehot), in place. With a reference's logits, also its log-probabilities and
// each row's KL(policy || reference). All tensors are contiguous and on the CPU: logits `[rows, columns]` of one kind, float32
// or bfloat16; int64 targets, float64 log-probabilities and float32 divergences `[rows]`. `reference`, `reference_logps` and
// `kl` are null together. `elsewhere` takes the GPU's kernel, in bfloat16.
dyad_error dyad_head_score(at::Tensor* policy, at::Tensor* reference, at::Tensor* targets, at::Tensor* logps,
                           at::Tensor* reference_logps, at::Tensor* kl, bool keep, bool elsewhere) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::head_score", std::vector<c10::IValue>{*policy});
    if (elsewhere) return dyad::head_score(*policy, reference, *targets, *logps, reference_logps, kl, keep);
    by_kind(*policy, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      Tile<T> tile{data<T>(*policy),
                   data_or_null<T>(reference),
                   data<int64_t>(*targets),
                   data<double>(*logps),
                   data_or_null<double>(reference_logps),
                   data_or_null<float>(kl),
                   policy->size(1)};
      at::parallel_for(0, policy->size(0), 1, [&](int64_t begin, int64_t end) {
        if (!keep) return dyad_score(tile, begin, end);
        std::vector<float> terms(tile.columns);
        dyad_score_and_keep(tile, begin, end, terms.data());
      });
    });
  });
}

}  // extern "C"
