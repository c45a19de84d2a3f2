// What attention over packed segments is made of: who sees whom, and loops over rows of scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/core/Tensor.h>

#include "lanes.h"

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
DYAD_INLINE void store_row(const float* from, float scale, T* to, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) narrow(scale * from[i], to[i]);
}

// Scores of one query, or products made of them: pieces of `PIECE` keys, `APART` values apart.
constexpr int64_t PIECE = 64, APART = PIECE * PIECE;

// Less than any score, and a number.
constexpr float NOTHING = -3.0e38f;

// Of a piece's first `count` scores the largest, or what was larger before. Loops are over whole pieces, one in a function:
// otherwise some do not become vector code.
DYAD_INLINE float largest(const float* scores, int32_t count, float top) {
#pragma omp simd reduction(max : top)
  for (int32_t i = 0; i < PIECE; ++i) {
    float score = i < count ? scores[i] : NOTHING;
    top = score > top ? score : top;
  }
  return top;
}

// Weights are `exp(scale s - top)`, and zero behind the first `count`; returns their sum.
template <typename E>
DYAD_INLINE float exponentials(const float* scores, E* weights, int32_t count, float scale, float top) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int32_t i = 0; i < PIECE; ++i) {
    // As a factor: of a choice the compiler makes a jump.
    float value = exponential_or_none(scale * scores[i] - top) * static_cast<float>(i < count);
    sum += value;
    narrow(value, weights[i]);
  }
  return sum;
}

// The queries of a tile: log-sum-exps and `o·do` of each.
struct Queries {
  const float *lse, *mean;
};

// Of one key: its scores, the gradients of its weights, and where weights and the gradients of scores go, one for each query.
template <typename E>
struct Key {
  const float *scores, *gradients;
  E *weights, *slopes;
};

// `p = exp(scale s - lse)` and `ds = p (dp - o·do)` for queries `[from, to)`, zero for the others.
template <typename E>
DYAD_INLINE void weights_backward(Key<E> key, Queries queries, int64_t from, int64_t to, float scale) {
  int32_t first = static_cast<int32_t>(from), last = static_cast<int32_t>(to);
#pragma omp simd
  for (int32_t i = 0; i < PIECE; ++i) {
    float asks = static_cast<float>((i >= first) & (i < last));
    float p = asks * exponential_or_none(scale * key.scores[i] - queries.lse[i]);
    narrow(p, key.weights[i]);
    narrow(p * (key.gradients[i] - queries.mean[i]), key.slopes[i]);
  }
}

template <typename E>
DYAD_INLINE float inner(const E* a, const E* b, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += widen(a[i]) * widen(b[i]);
  return sum;
}

}  // namespace
