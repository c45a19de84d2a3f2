// What attention over packed segments is made of: who sees whom, products, and rows of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/core/Tensor.h>

#include "lanes.h"

// MKL's, inside libtorch_cpu; column-major.
extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                       const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                       const int* ldc);

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

// Row-major `c[m, n] = alpha · a[m, k] · b[n, k]ᵀ`, the rows of c `stride` apart.
void times_transposed(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c, int64_t stride) {
  int rows = m, columns = n, inner = k, leading = stride;
  float one = 1.0f, zero = 0.0f;
  sgemm_("T", "N", &columns, &rows, &inner, &one, b, &inner, a, &inner, &zero, c, &leading);
}
// Row-major `c[m, n] = beta c + a[m, k] · b[k, n]`, the rows of a `stride` apart.
void times(int64_t m, int64_t n, int64_t k, const float* a, int64_t stride, const float* b, float beta, float* c) {
  int rows = m, columns = n, inner = k, leading = stride;
  float one = 1.0f;
  sgemm_("N", "N", &columns, &rows, &inner, &one, b, &columns, a, &leading, &beta, c, &columns);
}
// Row-major `c[k, n] += a[m, k]ᵀ · b[m, n]`, the rows of a `stride` apart.
void add_transposed_times(int64_t m, int64_t n, int64_t k, const float* a, int64_t stride, const float* b, float* c) {
  int rows = m, columns = n, inner = k, leading = stride;
  float one = 1.0f;
  sgemm_("N", "T", &columns, &inner, &rows, &one, b, &columns, a, &leading, &one, c, &columns);
}

// Float32 rows of one head from rows `stride` apart, times a factor.
template <typename T>
DYAD_INLINE void load_rows(const T* from, int64_t stride, float* to, int64_t rows, int64_t width, float factor) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += width)
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = widen(from[i]) * factor;
}
template <typename T>
DYAD_INLINE void store_rows(const float* from, T* to, int64_t stride, int64_t rows, int64_t width, float factor) {
  for (int64_t row = 0; row < rows; ++row, from += width, to += stride)
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) narrow(from[i] * factor, to[i]);
}

// Scores become probabilities; returns the log-sum-exp. Of one row each: with the rows' loop around them the compiler gives
// some copies of these loops up.
DYAD_INLINE float softmax(float* scores, int64_t seen) {
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
  for (int64_t i = 0; i < seen; ++i) scores[i] *= inverse;
  return top + std::log(sum);
}

// Probabilities from scores, and gradients of scores from those of probabilities: `ds = p (dp - o·do)`.
DYAD_INLINE void softmax_backward(float* scores, float* gradients, int64_t seen, float lse, const float* out,
                                  const float* out_gradient, int64_t width) {
  float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
  for (int64_t i = 0; i < width; ++i) mean += out[i] * out_gradient[i];
#pragma omp simd
  for (int64_t i = 0; i < seen; ++i) {
    float p = exponential(scores[i] - lse);
    scores[i] = p;
    gradients[i] = p * (gradients[i] - mean);
  }
}

}  // namespace
