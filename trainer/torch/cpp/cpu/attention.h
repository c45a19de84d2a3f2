// Which keys each query sees in attention over packed segments.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <ATen/core/Tensor.h>

namespace {

// `queries` consecutive tokens, from token `own` of the segment on. They see the first `prompt` tokens of the segment and, causally,
// themselves.
struct Run {
  int64_t prompt, own, queries;
  int64_t keys() const { return prompt + queries; }
};

struct Segment {
  int64_t start, length;
  std::vector<Run> runs;
};

// Parses segments, each given as [start, prompt, branch count, branch lengths…]. Tokens of runs count from the segment's start.
std::vector<Segment> segments_of(const int64_t* layout, size_t count) {
  std::vector<Segment> list;
  for (size_t i = 0; i < count;) {
    int64_t prompt = layout[i + 1], branches = layout[i + 2];
    Segment segment{layout[i], prompt, {}};
    i += 3;
    // The first branch continues the run of the prompt.
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

// Number of (query, key) pairs of one head where the query sees the key.
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

}  // namespace
