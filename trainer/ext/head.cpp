// The LM head's work on a tile of logits on the CPU, a row at a time while it is in cache. Float32 and bfloat16 logits; all
// arithmetic is float32, but a log-probability is float64: of a long sequence's sum, float32 would leave four digits.
#include "bridge.h"

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

// Sum of e^(z - max). A NaN among the logits stays one.
template <typename T>
DYAD_INLINE float row_sum(const T* z, float max, int64_t columns) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) sum += exponential_or_none(widen(z[i]) - max);
  return sum;
}

template <typename T>
DYAD_INLINE void to_probabilities(T* z, float lse, int64_t columns) {
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) narrow(exponential(widen(z[i]) - lse), z[i]);
}

// The sum of p (log p - log q); the probabilities take the logits' place where they are kept.
template <bool KEEP, typename T>
DYAD_INLINE float divergence(T* z, float lse, const T* r, float reference_lse, int64_t columns) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) {
    float log_p = widen(z[i]) - lse, p = exponential(log_p);
    sum += p * (log_p - (widen(r[i]) - reference_lse));
    if constexpr (KEEP) narrow(p, z[i]);
  }
  return sum;
}

template <typename T>
struct Tile {
  // Logits in, probabilities out where they are kept. `[rows, columns]`
  T* policy;
  // Null without a reference. `[rows, columns]`
  const T* reference;
  const int64_t* targets;
  double* logps;
  double* reference_logps;
  float* kl;
  int64_t columns;
  bool keep;
};

template <typename T>
DYAD_INLINE double log_sum_exp(const T* z, int64_t columns) {
  float max = row_max(z, columns);
  return static_cast<double>(max) + __builtin_log(static_cast<double>(row_sum(z, max, columns)));
}

template <typename T>
DYAD_INLINE void score_rows(const Tile<T>& tile, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* z = tile.policy + row * tile.columns;
    int64_t target = tile.targets[row];
    double exact = log_sum_exp(z, tile.columns);
    float lse = static_cast<float>(exact);
    tile.logps[row] = widen(z[target]) - exact;
    if (tile.reference == nullptr) {
      if (tile.keep) to_probabilities(z, lse, tile.columns);
      continue;
    }
    const T* r = tile.reference + row * tile.columns;
    double reference_exact = log_sum_exp(r, tile.columns);
    float reference_lse = static_cast<float>(reference_exact);
    tile.reference_logps[row] = widen(r[target]) - reference_exact;
    tile.kl[row] = tile.keep ? divergence<true>(z, lse, r, reference_lse, tile.columns)
                             : divergence<false>(z, lse, r, reference_lse, tile.columns);
  }
}

template <typename T>
DYAD_INLINE void differentiate_rows(T* p, const int64_t* targets, const float* a, int64_t columns, int64_t begin,
                                    int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* x = p + row * columns;
    float scale = a[row], at_target = widen(x[targets[row]]);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) narrow(-scale * widen(x[i]), x[i]);
    narrow(scale * (1.0f - at_target), x[targets[row]]);
  }
}

}  // namespace

#define DYAD_INSTANCES(T)                                                                                               \
  DYAD_CLONES void dyad_score(const Tile<T>& tile, int64_t begin, int64_t end) { score_rows(tile, begin, end); }        \
  DYAD_CLONES void dyad_differentiate(T* p, const int64_t* targets, const float* a, int64_t columns, int64_t begin,     \
                                      int64_t end) {                                                                    \
    differentiate_rows(p, targets, a, columns, begin, end);                                                             \
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

// Turns each row of the policy's logits into the log-probability of its target and, where `keep` is set, into probabilities,
// in place. With a reference's logits, also its log-probabilities and each row's KL(policy || reference). All tensors are
// contiguous and on the CPU: logits `[rows, columns]` of one kind, float32 or bfloat16; int64 targets, float64
// log-probabilities and float32 divergences `[rows]`. `reference`, `reference_logps` and `kl` are null together.
dyad_error dyad_head_score(at::Tensor* policy, at::Tensor* reference, at::Tensor* targets, at::Tensor* logps,
                           at::Tensor* reference_logps, at::Tensor* kl, bool keep) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::head_score", std::vector<c10::IValue>{*policy});
    by_kind(*policy, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      Tile<T> tile{data<T>(*policy),
                   data_or_null<T>(reference),
                   data<int64_t>(*targets),
                   data<double>(*logps),
                   data_or_null<double>(reference_logps),
                   data_or_null<float>(kl),
                   policy->size(1),
                   keep};
      at::parallel_for(0, policy->size(0), 1, [&](int64_t begin, int64_t end) { dyad_score(tile, begin, end); });
    });
  });
}

// Turns kept probabilities into the loss's gradient by the logits, in place: `a (onehot(target) - p)`.
dyad_error dyad_head_differentiate(at::Tensor* probabilities, at::Tensor* targets, at::Tensor* a) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::head_differentiate", std::vector<c10::IValue>{*probabilities});
    by_kind(*probabilities, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      at::parallel_for(0, probabilities->size(0), 1, [&](int64_t begin, int64_t end) {
        dyad_differentiate(data<T>(*probabilities), data<int64_t>(*targets), data<float>(*a), probabilities->size(1), begin,
                           end);
      });
    });
  });
}

}  // extern "C"
