// Attention over packed segments on the CPU: a prompt, then branches that each see the prompt and themselves. One call a
// layer: threads take heads of segments, and within one, tiles of queries against all keys that any of them sees. No mask is
// ever made, what nobody sees is not computed, and scores never leave a core's cache. Products are MKL's, those of libtorch.
#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "bridge.h"

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

#define DYAD_LOAD(T, E)                                                                                    \
  DYAD_CLONES void dyad_load_rows(const T* from, int64_t stride, E* to, int64_t rows, int64_t width) {     \
    load_rows(from, stride, to, rows, width);                                                              \
  }
#define DYAD_STORE(T)                                                                                      \
  DYAD_CLONES void dyad_store_rows(const float* from, T* to, int64_t stride, int64_t rows, int64_t width) { \
    store_rows(from, to, stride, rows, width);                                                             \
  }
#define DYAD_SOFTMAX(E)                                                                                    \
  DYAD_CLONES float dyad_softmax(float* scores, E* probabilities, int64_t seen) {                          \
    return softmax(scores, probabilities, seen);                                                           \
  }                                                                                                        \
  DYAD_CLONES void dyad_softmax_backward(Row<E> row, int64_t seen, float lse, const E* out, const E* out_gradient, \
                                         int64_t width) {                                                  \
    softmax_backward(row, seen, lse, out, out_gradient, width);                                            \
  }
DYAD_LOAD(float, float)
DYAD_LOAD(Bf16, float)
DYAD_LOAD(Bf16, Bf16)
DYAD_STORE(float)
DYAD_STORE(Bf16)
DYAD_SOFTMAX(float)
DYAD_SOFTMAX(Bf16)
#undef DYAD_LOAD
#undef DYAD_STORE
#undef DYAD_SOFTMAX
DYAD_CLONES void dyad_add_floats(float* total, const float* part, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) total[i] += part[i];
}

namespace {

// Queries of a tile: its scores fill about half of a core's second-level cache, at any length.
int64_t tile_of(int64_t keys) { return std::clamp<int64_t>((1 << 17) / std::max<int64_t>(keys, 1), 16, 128); }

// A thread's room for rows; grows as asked for.
class Room {
 public:
  template <typename E = float>
  E* take(int64_t values) {
    buffers_.emplace_back(static_cast<size_t>(values) * sizeof(E) / sizeof(float) + 1);
    return reinterpret_cast<E*>(buffers_.back().data());
  }
  // Room for what is made of `floats`: the same where that has their type.
  template <typename E>
  E* made_of(float* floats, int64_t values) {
    if constexpr (std::is_same_v<E, float>)
      return floats;
    else
      return take<E>(values);
  }

 private:
  std::vector<std::vector<float>> buffers_;
};

// The longest segment and run, for which a thread makes room once.
struct Extent {
  int64_t length = 0, keys = 0, tile = 0, scores = 0;
  explicit Extent(const std::vector<Segment>& segments) {
    for (const auto& segment : segments) {
      length = std::max(length, segment.length);
      for (const auto& run : segment.runs) {
        int64_t rows = tile_of(run.keys());
        keys = std::max(keys, run.keys());
        tile = std::max(tile, rows);
        scores = std::max(scores, rows * run.keys());
      }
    }
  }
};

// Calls `body(first, count, seen)` for each tile of a run: its first query, how many, and how many keys the first one sees.
template <typename Body>
void tiles(const Run& run, Body&& body) {
  int64_t size = tile_of(run.keys());
  for (int64_t first = 0; first < run.queries; first += size)
    body(first, std::min(size, run.queries - first), run.prompt + first + 1);
}

// One head of a packed tensor `[tokens, heads, width]`, from a token on.
template <typename T>
struct Head {
  T* rows;
  int64_t stride;
  Head(const at::Tensor& x, int64_t token, int64_t head)
      : rows(data<T>(x) + (token * x.size(1) + head) * x.size(2)), stride(x.size(1) * x.size(2)) {}
  T* at(int64_t token) const { return rows + token * stride; }
};

// Keys or values that a run sees, prompt first.
template <typename T, typename E>
void load_seen(const Head<T>& head, const Run& run, E* to, int64_t width) {
  dyad_load_rows(head.at(0), head.stride, to, run.prompt, width);
  dyad_load_rows(head.at(run.own), head.stride, to + run.prompt * width, run.queries, width);
}

// Tensors of T, products of E.
template <typename T, typename E>
struct Forward {
  const at::Tensor &q, &k, &v, &out, &lse;
  Shape shape;
  const std::vector<Segment>& segments;

  // Head-major, so that threads get equal shares whatever the segments' lengths.
  void operator()(int64_t begin, int64_t end) const {
    Extent extent(segments);
    Room room;
    int64_t width = shape.width, count = static_cast<int64_t>(segments.size());
    E *keys = room.take<E>(extent.keys * width), *values = room.take<E>(extent.keys * width);
    E* queries = room.take<E>(extent.tile * width);
    float *scores = room.take(extent.scores), *sums = room.take(extent.tile * width);
    E* probabilities = room.made_of<E>(scores, extent.scores);
    for (int64_t task = begin; task < end; ++task) {
      const auto& segment = segments[task % count];
      int64_t head = task / count;
      Head<T> asks(q, segment.start, head), key(k, segment.start, head / shape.group), value(v, segment.start, head / shape.group);
      Head<T> says(out, segment.start, head);
      for (const auto& run : segment.runs) {
        load_seen(key, run, keys, width);
        load_seen(value, run, values, width);
        tiles(run, [&](int64_t first, int64_t rows, int64_t seen) {
          int64_t token = run.own + first, stride = seen + rows - 1;
          dyad_load_rows(asks.at(token), asks.stride, queries, rows, width);
          times_transposed(rows, stride, width, shape.scale, queries, keys, scores, stride);
          float* total = data<float>(lse) + (segment.start + token) * shape.heads + head;
          for (int64_t row = 0; row < rows; ++row) {
            E* at = probabilities + row * stride;
            total[row * shape.heads] = dyad_softmax(scores + row * stride, at, seen + row);
            std::fill(at + seen + row, at + stride, E{});
          }
          times(rows, width, stride, 1.0f, probabilities, stride, values, sums);
          dyad_store_rows(sums, says.at(token), says.stride, rows, width);
        });
      }
    }
  }
};

// Gradients of one key/value head of a segment, collected over the heads and runs that see it.
struct Collected {
  float *keys, *values;
  int64_t width;
  void clear(int64_t rows) const {
    std::fill(keys, keys + rows * width, 0.0f);
    std::fill(values, values + rows * width, 0.0f);
  }
  // Those of a run's keys, prompt first, to their places in the segment.
  void add(const Collected& seen, const Run& run) const {
    auto add_rows = [&](float* to, const float* from) {
      dyad_add_floats(to, from, run.prompt * width);
      dyad_add_floats(to + run.own * width, from + run.prompt * width, run.queries * width);
    };
    add_rows(keys, seen.keys);
    add_rows(values, seen.values);
  }
};

// A thread's room for a backward pass.
template <typename E>
struct Bench {
  Room room;
  E *keys, *values, *queries, *out, *out_gradient;
  float *query_gradient, *scores, *gradients;
  E *probabilities, *slopes;
  Collected seen, all;
  Bench(const Extent& extent, int64_t width)
      : keys(room.take<E>(extent.keys * width)), values(room.take<E>(extent.keys * width)),
        queries(room.take<E>(extent.tile * width)), out(room.take<E>(extent.tile * width)),
        out_gradient(room.take<E>(extent.tile * width)), query_gradient(room.take(extent.tile * width)),
        scores(room.take(extent.scores)), gradients(room.take(extent.scores)),
        probabilities(room.made_of<E>(scores, extent.scores)), slopes(room.made_of<E>(gradients, extent.scores)),
        seen{room.take(extent.keys * width), room.take(extent.keys * width), width},
        all{room.take(extent.length * width), room.take(extent.length * width), width} {}
};

template <typename T, typename E>
struct Backward {
  const at::Tensor &q, &k, &v, &out, &lse, &gradient, &dq, &dk, &dv;
  Shape shape;
  const std::vector<Segment>& segments;

  void operator()(int64_t begin, int64_t end) const {
    Bench<E> bench(Extent(segments), shape.width);
    int64_t count = static_cast<int64_t>(segments.size());
    for (int64_t task = begin; task < end; ++task) {
      const auto& segment = segments[task % count];
      int64_t kv_head = task / count;
      bench.all.clear(segment.length);
      for (const auto& run : segment.runs) {
        load_seen(Head<T>(k, segment.start, kv_head), run, bench.keys, shape.width);
        load_seen(Head<T>(v, segment.start, kv_head), run, bench.values, shape.width);
        bench.seen.clear(run.keys());
        for (int64_t head = kv_head * shape.group; head < (kv_head + 1) * shape.group; ++head)
          run_backward(bench, segment, run, head);
        bench.all.add(bench.seen, run);
      }
      Head<T> key(dk, segment.start, kv_head), value(dv, segment.start, kv_head);
      dyad_store_rows(bench.all.keys, key.at(0), key.stride, segment.length, shape.width);
      dyad_store_rows(bench.all.values, value.at(0), value.stride, segment.length, shape.width);
    }
  }

  // Scores are computed again; with s = q·k/√d, p = softmax(s): dv += pᵀ do, ds = p (do·v - o·do), dq = ds k/√d, dk += dsᵀ q/√d.
  void run_backward(Bench<E>& at, const Segment& segment, const Run& run, int64_t head) const {
    Head<T> asks(q, segment.start, head), says(out, segment.start, head), slope(gradient, segment.start, head);
    Head<T> asked(dq, segment.start, head);
    int64_t width = shape.width;
    tiles(run, [&](int64_t first, int64_t rows, int64_t seen) {
      int64_t token = run.own + first, stride = seen + rows - 1;
      dyad_load_rows(asks.at(token), asks.stride, at.queries, rows, width);
      dyad_load_rows(says.at(token), says.stride, at.out, rows, width);
      dyad_load_rows(slope.at(token), slope.stride, at.out_gradient, rows, width);
      times_transposed(rows, stride, width, shape.scale, at.queries, at.keys, at.scores, stride);
      times_transposed(rows, stride, width, 1.0f, at.out_gradient, at.values, at.gradients, stride);
      const float* total = data<float>(lse) + (segment.start + token) * shape.heads + head;
      for (int64_t row = 0; row < rows; ++row) {
        int64_t from = row * stride, upto = from + seen + row;
        dyad_softmax_backward(Row<E>{at.scores + from, at.gradients + from, at.probabilities + from, at.slopes + from},
                              seen + row, total[row * shape.heads], at.out + row * width, at.out_gradient + row * width,
                              width);
        std::fill(at.probabilities + upto, at.probabilities + from + stride, E{});
        std::fill(at.slopes + upto, at.slopes + from + stride, E{});
      }
      add_transposed_times(rows, width, stride, 1.0f, at.probabilities, stride, at.out_gradient, at.seen.values);
      add_transposed_times(rows, width, stride, shape.scale, at.slopes, stride, at.queries, at.seen.keys);
      times(rows, width, stride, shape.scale, at.slopes, stride, at.keys, at.query_gradient);
      dyad_store_rows(at.query_gradient, asked.at(token), asked.stride, rows, width);
    });
  }
};

// What the profiler shows: the queries' shape, and the pairs that see each other.
std::vector<c10::IValue> seen_by(const at::Tensor& q, const std::vector<Segment>& segments) {
  return {q, at::empty({visible_pairs(segments), 0}, q.options())};
}

struct SegmentedAttention : public Function<SegmentedAttention> {
  static Variable forward(AutogradContext* context, const Variable& query, const Variable& key, const Variable& value,
                          std::vector<int64_t> layout) {
    auto q = query.contiguous(), k = key.contiguous(), v = value.contiguous(), out = at::empty_like(q);
    auto lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
    auto segments = segments_of(layout.data(), layout.size());
    Shape shape(q, k);
    RECORD_FUNCTION("dyad::attention", seen_by(q, segments));
    by_kind(q, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      by_operand<T>([&](auto* operand) {
        using E = std::remove_pointer_t<decltype(operand)>;
        at::parallel_for(0, shape.heads * static_cast<int64_t>(segments.size()), 1,
                         Forward<T, E>{q, k, v, out, lse, shape, segments});
      });
    });
    context->save_for_backward({q, k, v, out, lse});
    context->saved_data["layout"] = layout;
    return out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto layout = context->saved_data["layout"].toIntVector();
    auto segments = segments_of(layout.data(), layout.size());
    auto gradient = gradients[0].contiguous();
    auto dq = at::empty_like(saved[0]), dk = at::empty_like(saved[1]), dv = at::empty_like(saved[2]);
    Shape shape(saved[0], saved[1]);
    RECORD_FUNCTION("dyad::attention_backward", seen_by(saved[0], segments));
    by_kind(saved[0], [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      by_operand<T>([&](auto* operand) {
        using E = std::remove_pointer_t<decltype(operand)>;
        at::parallel_for(
            0, shape.kv_heads * static_cast<int64_t>(segments.size()), 1,
            Backward<T, E>{saved[0], saved[1], saved[2], saved[3], saved[4], gradient, dq, dk, dv, shape, segments});
      });
    });
    return {dq, dk, dv, Variable()};
  }
};

}  // namespace

extern "C" {

// Softmax attention with scale 1/sqrt(width). `[tokens, heads, width]` queries, `[tokens, kv heads, width]` keys and values;
// returns a new tensor of the queries' shape, owned by the caller. CPU tensors of one kind, float32 or bfloat16; segments cover
// all tokens.
dyad_error dyad_segmented_attention(at::Tensor* query, at::Tensor* key, at::Tensor* value, const int64_t* layout,
                                    size_t count, at::Tensor** out) {
  return guarded([&] {
    *out = new at::Tensor(
        SegmentedAttention::apply(*query, *key, *value, std::vector<int64_t>(layout, layout + count)));
  });
}

}  // extern "C"
