// What attention over packed segments is made of: who sees whom, products, and rows of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>

#include "lanes.h"

// MKL's, inside libtorch_cpu; column-major.
extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                       const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                       const int* ldc);
extern "C" void gemm_bf16bf16f32_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                                  const float* alpha, const uint16_t* a, const int* lda, const uint16_t* b, const int* ldb,
                                  const float* beta, float* c, const int* ldc);

namespace {

// Consecutive tokens: `queries` of them ask, and see the first `prompt` tokens of the segment and themselves, causally.
struct Run {
  int64_t prompt, own, queries;
  int64_t keys() const { return prompt + queries; }
};

struct Segment {
  int64_t start, length;
  std::vector<Run> runs;
};

// Segments come as [start, prompt, branch count, branch lengths…] one after the other. Tokens of runs count from the start.
std::vector<Segment> segments_of(const int64_t* layout, size_t count) {
  std::vector<Segment> list;
  for (size_t i = 0; i < count;) {
    int64_t prompt = layout[i + 1], branches = layout[i + 2];
    Segment segment{layout[i], prompt, {}};
    i += 3;
    // The first branch simply goes on from the prompt.
    if (branches == 0) segment.runs.push_back({0, 0, prompt});
    for (int64_t branch = 0; branch < branches; ++branch, ++i) {
      if (branch == 0)
        segment.runs.push_back({0, 0, prompt + layout[i]});
      else
        segment.runs.push_back({prompt, segment.length, layout[i]});
      segment.length += layout[i];
    }
    list.push_back(std::move(segment));
  }
  return list;
}

// Queries and keys that see each other, of one head.
int64_t visible_pairs(const std::vector<Segment>& segments) {
  int64_t pairs = 0;
  for (const auto& segment : segments)
    for (const auto& run : segment.runs) pairs += run.queries * run.prompt + run.queries * (run.queries + 1) / 2;
  return pairs;
}

struct Shape {
  int64_t heads, kv_heads, group, width;
  float scale;
  Shape(const at::Tensor& q, const at::Tensor& k)
      : heads(q.size(1)), kv_heads(k.size(1)), group(heads / kv_heads), width(q.size(2)),
        scale(1.0f / std::sqrt(static_cast<float>(width))) {}
};

// Calls the body with a null pointer of what products of a tensor's values are made of. MKL multiplies bfloat16 several times as
// fast as float32 where the CPU has tiles (AMX), and more slowly elsewhere.
template <typename T, typename Body>
void by_operand(Body&& body) {
  if constexpr (std::is_same_v<T, Bf16>) {
    static const bool has_tiles = at::cpu::init_amx();
    if (has_tiles) return body(static_cast<Bf16*>(nullptr));
  }
  body(static_cast<float*>(nullptr));
}

inline void multiply(const char* transa, const char* transb, int m, int n, int k, float alpha, const float* a, int lda,
                     const float* b, int ldb, float beta, float* c, int ldc) {
  sgemm_(transa, transb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void multiply(const char* transa, const char* transb, int m, int n, int k, float alpha, const Bf16* a, int lda,
                     const Bf16* b, int ldb, float beta, float* c, int ldc) {
  gemm_bf16bf16f32_(transa, transb, &m, &n, &k, &alpha, &a->bits, &lda, &b->bits, &ldb, &beta, c, &ldc);
}

// Row-major `c[m, n] = alpha · a[m, k] · b[n, k]ᵀ`, the rows of c `stride` apart.
template <typename E>
void times_transposed(int64_t m, int64_t n, int64_t k, float alpha, const E* a, const E* b, float* c, int64_t stride) {
  multiply("T", "N", n, m, k, alpha, b, k, a, k, 0.0f, c, stride);
}
// Row-major `c[m, n] = alpha · a[m, k] · b[k, n]`, the rows of a `stride` apart.
template <typename E>
void times(int64_t m, int64_t n, int64_t k, float alpha, const E* a, int64_t stride, const E* b, float* c) {
  multiply("N", "N", n, m, k, alpha, b, n, a, stride, 0.0f, c, n);
}
// Row-major `c[k, n] += alpha · a[m, k]ᵀ · b[m, n]`, the rows of a `stride` apart.
template <typename E>
void add_transposed_times(int64_t m, int64_t n, int64_t k, float alpha, const E* a, int64_t stride, const E* b, float* c) {
  multiply("N", "T", n, k, m, alpha, b, n, a, stride, 1.0f, c, n);
}

// Rows of one head from rows `stride` apart, as products take them.
template <typename T, typename E>
DYAD_INLINE void load_rows(const T* from, int64_t stride, E* to, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += width) {
    if constexpr (std::is_same_v<T, E>) {
      std::memcpy(to, from, width * sizeof(T));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]);
    }
  }
}
template <typename T>
DYAD_INLINE void store_rows(const float* from, T* to, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, from += width, to += stride)
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(from[i], to[i]);
}

// Scores become probabilities, at the same place if products take float32; returns the log-sum-exp. Of one row each: with the
// rows' loop around them the compiler gives some copies of these loops up.
template <typename E>
DYAD_INLINE float softmax(float* scores, E* probabilities, int64_t seen) {
  float top = scores[0], sum = 0.0f;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < seen; ++i) top = scores[i] > top ? scores[i] : top;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < seen; ++i) {
    scores[i] = exponential(scores[i] - top);
    sum += scores[i];
  }
  float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < seen; ++i) narrow(scores[i] * inverse, probabilities[i]);
  return top + std::log(sum);
}

// Of one row of a tile: its scores and the gradients of its probabilities, and where probabilities and the gradients of scores
// go, at the same places if products take float32.
template <typename E>
struct Row {
  float *scores, *gradients;
  E *probabilities, *slopes;
};

// `p = exp(s - lse)` and `ds = p (dp - o·do)`.
template <typename E>
DYAD_INLINE void softmax_backward(Row<E> row, int64_t seen, float lse, const E* out, const E* out_gradient, int64_t width) {
  float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < width; ++i) mean += widen(out[i]) * widen(out_gradient[i]);
#pragma omp simd
  for (int64_t i = 0; i < seen; ++i) {
    float p = exponential(row.scores[i] - lse), slope = p * (row.gradients[i] - mean);
    narrow(p, row.probabilities[i]);
    narrow(slope, row.slopes[i]);
  }
}

}  // namespace
