// Attention over packed segments on the CPU, in one call per layer. A segment is a prompt, then branches that each see the prompt
// and themselves. A task is one head of one segment. It multiplies tiles of queries by pieces of the keys that a tile sees. No mask
// is built, pieces that no query sees are skipped, and scores stay in a core's cache.
#include "attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include "bridge.h"
#include "product.h"
#include "rows.h"
#include "tensors.h"

using dyad::APART;
using dyad::block_product;
using dyad::Keys;
using dyad::loops;
using dyad::PIECE;
using dyad::pieces;
using dyad::Queries;
using dyad::rounded_up;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

static_assert(PIECE == dyad::PANEL && PIECE == dyad::BLOCK);

// Queries per tile: a run is split into tiles of equal size.
int64_t tile_of(int64_t queries) { return rounded_up(pieces(queries, pieces(queries, PIECE)), dyad::BLOCK_STEP); }

// Allocates a thread's buffers for one call.
class Room {
 public:
  template <typename E>
  E* take(int64_t values) {
    void* memory = std::aligned_alloc(64, rounded_up(values * static_cast<int64_t>(sizeof(E)), 64));
    if (memory == nullptr) throw std::bad_alloc();
    memory_.emplace_back(memory, &std::free);
    return static_cast<E*>(memory);
  }

 private:
  std::vector<std::unique_ptr<void, decltype(&std::free)>> memory_;
};

// The length of the longest segment and the largest number of keys of a run: sizes of a thread's buffers.
struct Extent {
  int64_t length = 0, keys = 0;
  explicit Extent(const std::vector<Segment>& segments) {
    for (const auto& segment : segments) {
      length = std::max(length, segment.length);
      for (const auto& run : segment.runs) keys = std::max(keys, rounded_up(run.keys(), PIECE));
    }
  }
};

struct Tile {
  // First query in the run; number of queries; the same with padding; number of keys that the first query sees.
  int64_t first, rows, padded, seen;
  int64_t pieces_seen() const { return pieces(seen + rows - 1, PIECE); }
};

template <typename Body>
void tiles(const Run& run, Body&& body) {
  if (run.queries == 0) return;
  int64_t size = tile_of(run.queries);
  for (int64_t first = 0; first < run.queries; first += size) {
    int64_t rows = std::min(size, run.queries - first);
    body(Tile{first, rows, rounded_up(rows, dyad::BLOCK_STEP), run.prompt + first + 1});
  }
}

// One head of a packed tensor `[tokens, heads, width]`, starting at a token.
template <typename T>
struct Head {
  T* rows;
  int64_t stride, width;
  Head(const at::Tensor& x, int64_t token, int64_t head)
      : rows(data<T>(x) + (token * x.size(1) + head) * x.size(2)), stride(x.size(1) * x.size(2)), width(x.size(2)) {}

  // Copies rows in the element type of products, and pads them with rows of zeros.
  template <typename E>
  void load(int64_t token, int64_t count, int64_t padded, E* to) const {
    if constexpr (std::is_same_v<T, E>)
      loops<E>().load(rows + token * stride, stride, to, count, width);
    else
      loops<T>().load_wide(rows + token * stride, stride, to, count, width);
    std::fill(to + count * width, to + padded * width, E{});
  }
  // Copies the keys or values that a run sees, prompt first.
  template <typename E>
  void load_seen(const Run& run, E* to) const {
    load(0, run.prompt, run.prompt, to);
    load(run.own, run.queries, rounded_up(run.keys(), PIECE) - run.prompt, to + run.prompt * width);
  }
  void store(int64_t token, const float* from, float scale) const {
    loops<T>().store(from, scale, rows + token * stride, width);
  }
};

// Packs rows `[PIECE, width]` of a head as the right side of products.
template <typename E>
struct Packing {
  int64_t width;
  // Columns with padding to whole panels.
  int64_t columns() const { return rounded_up(width, PIECE); }

  // Transposes to `[width, rows]`.
  void turn(const E* from, int64_t rows, E* to) const {
    if constexpr (std::is_same_v<E, Bf16>)
      dyad_transpose_pairs(from, width, to, PIECE, rows, width);
    else
      dyad_transpose(from, width, to, PIECE, rows, width);
  }
  // Packs `[rows, width]` into panels that are `APART` values apart.
  void pair(const E* from, int64_t rows, E* to) const {
    dyad::Right<E> right{from, rows, width, false};
    for (int64_t panel = 0; panel * PIECE < width; ++panel) right.pack(panel, 0, rows, to + panel * APART);
  }
  // `to[rows, width] (+)= a[rows, depth] · paired[depth, width]`, the rows of `a` are `PIECE` values long.
  void times(int64_t rows, int64_t depth, bool add, const E* a, const E* paired, float* to) const {
    for (int64_t panel = 0; panel * PIECE < width; ++panel)
      block_product(rows, std::min(PIECE, width - panel * PIECE), depth, {PIECE, columns()}, add, a, paired + panel * APART,
                    to + panel * PIECE);
  }
};

// `T` is the element type of tensors, `E` that of products.
template <typename T, typename E>
struct Forward {
  const at::Tensor &q, &k, &v, &out, &lse;
  Shape shape;
  const std::vector<Segment>& segments;

  struct Desk {
    Room room;
    Packing<E> packing;
    E *rows, *turned_keys, *paired_values, *queries, *weights;
    float *scores, *sums;
    Desk(const Extent& extent, int64_t width)
        : packing{width}, rows(room.take<E>(extent.keys * width)), turned_keys(room.take<E>(extent.keys * width)),
          paired_values(room.take<E>(extent.keys * packing.columns())), queries(room.take<E>(PIECE * width)),
          weights(room.take<E>(extent.keys * PIECE)), scores(room.take<float>(extent.keys * PIECE)),
          sums(room.take<float>(PIECE * packing.columns())) {}
  };

  // Tasks are ordered by head, so that threads get equal shares even if segments differ in length.
  void operator()(int64_t begin, int64_t end) const {
    Desk desk(Extent(segments), shape.width);
    dyad::Tiles<E> registers;
    int64_t count = static_cast<int64_t>(segments.size());
    for (int64_t task = begin; task < end; ++task) {
      const auto& segment = segments[task % count];
      int64_t head = task / count;
      for (const auto& run : segment.runs) {
        pack(desk, segment, run, head / shape.group);
        tiles(run, [&](const Tile& tile) { answer(desk, segment, run, head, tile); });
      }
    }
  }

  void pack(const Desk& desk, const Segment& segment, const Run& run, int64_t kv_head) const {
    int64_t width = shape.width, columns = desk.packing.columns();
    Head<T>(k, segment.start, kv_head).load_seen(run, desk.rows);
    for (int64_t at = 0; at < run.keys(); at += PIECE)
      desk.packing.turn(desk.rows + at * width, PIECE, desk.turned_keys + at * width);
    Head<T>(v, segment.start, kv_head).load_seen(run, desk.rows);
    for (int64_t at = 0; at < run.keys(); at += PIECE)
      desk.packing.pair(desk.rows + at * width, PIECE, desk.paired_values + at * columns);
  }

  void answer(const Desk& desk, const Segment& segment, const Run& run, int64_t head, const Tile& tile) const {
    int64_t width = shape.width, token = run.own + tile.first, columns = desk.packing.columns();
    Head<T>(q, segment.start, head).load(token, tile.rows, tile.padded, desk.queries);
    for (int64_t piece = 0; piece < tile.pieces_seen(); ++piece)
      block_product(tile.padded, PIECE, width, {width, PIECE}, false, desk.queries, desk.turned_keys + piece * PIECE * width,
                    desk.scores + piece * APART);
    float sums[PIECE], *total = data<float>(lse) + (segment.start + token) * shape.heads + head;
    for (int64_t row = 0; row < tile.rows; ++row) {
      auto [top, sum] = loops<E>().weigh(desk.scores + row * PIECE, desk.weights + row * PIECE, tile.seen + row,
                                         tile.pieces_seen(), shape.scale);
      sums[row] = sum;
      total[row * shape.heads] = top + std::log(sum);
    }
    for (int64_t piece = 0; piece < tile.pieces_seen(); ++piece)
      desk.packing.times(tile.padded, PIECE, piece > 0, desk.weights + piece * APART,
                         desk.paired_values + piece * PIECE * columns, desk.sums);
    Head<T> says(out, segment.start, head);
    for (int64_t row = 0; row < tile.rows; ++row) says.store(token + row, desk.sums + row * columns, 1.0f / sums[row]);
  }
};

// Gradients of one key/value head, summed over the query heads and runs that see it.
struct Collected {
  float *keys, *values;
  int64_t columns;
  void clear(int64_t rows) const {
    std::fill(keys, keys + rows * columns, 0.0f);
    std::fill(values, values + rows * columns, 0.0f);
  }
  // Adds the gradients of a run's keys, prompt first, to their places in the segment.
  void add(const Collected& seen, const Run& run) const {
    auto add_rows = [&](float* to, const float* from) {
      loops<float>().add(to, from, run.prompt * columns);
      loops<float>().add(to + run.own * columns, from + run.prompt * columns, run.queries * columns);
    };
    add_rows(keys, seen.keys);
    add_rows(values, seen.values);
  }
};

template <typename T, typename E>
struct Backward {
  const at::Tensor &q, &k, &v, &out, &lse, &gradient, &dq, &dk, &dv;
  Shape shape;
  const std::vector<Segment>& segments;

  struct Desk {
    Room room;
    Packing<E> packing;
    // Buffers for a run.
    E *keys, *values, *paired_keys;
    // Buffers for a tile.
    E *queries, *out, *gradients, *turned_queries, *turned_gradients, *paired_queries, *paired_gradients;
    float *lse, *mean, *query_gradients;
    // Buffers for a tile and a piece of the keys.
    float *scores, *weight_gradients;
    E *weights, *slopes, *turned_slopes;
    Collected seen, all;
    Desk(const Extent& extent, int64_t width)
        : packing{width}, keys(room.take<E>(extent.keys * width)), values(room.take<E>(extent.keys * width)),
          paired_keys(room.take<E>(extent.keys * packing.columns())), queries(room.take<E>(PIECE * width)),
          out(room.take<E>(PIECE * width)), gradients(room.take<E>(PIECE * width)),
          turned_queries(room.take<E>(PIECE * width)), turned_gradients(room.take<E>(PIECE * width)),
          paired_queries(room.take<E>(PIECE * packing.columns())), paired_gradients(room.take<E>(PIECE * packing.columns())),
          lse(room.take<float>(PIECE)), mean(room.take<float>(PIECE)),
          query_gradients(room.take<float>(PIECE * packing.columns())), scores(room.take<float>(APART)),
          weight_gradients(room.take<float>(APART)), weights(room.take<E>(APART)), slopes(room.take<E>(APART)),
          turned_slopes(room.take<E>(APART)), seen(collected(extent.keys)), all(collected(extent.length)) {}
    Collected collected(int64_t rows) {
      int64_t columns = packing.columns();
      return {room.take<float>(rows * columns), room.take<float>(rows * columns), columns};
    }
  };

  void operator()(int64_t begin, int64_t end) const {
    Desk desk(Extent(segments), shape.width);
    dyad::Tiles<E> registers;
    int64_t count = static_cast<int64_t>(segments.size()), columns = desk.packing.columns();
    for (int64_t task = begin; task < end; ++task) {
      const auto& segment = segments[task % count];
      int64_t kv_head = task / count;
      desk.all.clear(segment.length);
      for (const auto& run : segment.runs) run_backward(desk, segment, run, kv_head);
      Head<T> key(dk, segment.start, kv_head), value(dv, segment.start, kv_head);
      for (int64_t token = 0; token < segment.length; ++token) {
        key.store(token, desk.all.keys + token * columns, shape.scale);
        value.store(token, desk.all.values + token * columns, 1.0f);
      }
    }
  }

  void run_backward(const Desk& desk, const Segment& segment, const Run& run, int64_t kv_head) const {
    Head<T>(k, segment.start, kv_head).load_seen(run, desk.keys);
    Head<T>(v, segment.start, kv_head).load_seen(run, desk.values);
    for (int64_t at = 0; at < run.keys(); at += PIECE)
      desk.packing.pair(desk.keys + at * shape.width, PIECE, desk.paired_keys + at * desk.packing.columns());
    desk.seen.clear(rounded_up(run.keys(), PIECE));
    for (int64_t head = kv_head * shape.group; head < (kv_head + 1) * shape.group; ++head)
      tiles(run, [&](const Tile& tile) {
        load_queries(desk, segment, run, head, tile);
        for (int64_t piece = 0; piece < tile.pieces_seen(); ++piece) piece_backward(desk, tile, piece);
        Head<T> asked(dq, segment.start, head);
        for (int64_t row = 0; row < tile.rows; ++row)
          asked.store(run.own + tile.first + row, desk.query_gradients + row * desk.packing.columns(), shape.scale);
      });
    desk.all.add(desk.seen, run);
  }

  void load_queries(const Desk& desk, const Segment& segment, const Run& run, int64_t head, const Tile& tile) const {
    int64_t token = run.own + tile.first, width = shape.width;
    Head<T>(q, segment.start, head).load(token, tile.rows, tile.padded, desk.queries);
    Head<T>(out, segment.start, head).load(token, tile.rows, tile.padded, desk.out);
    Head<T>(gradient, segment.start, head).load(token, tile.rows, tile.padded, desk.gradients);
    desk.packing.turn(desk.queries, tile.padded, desk.turned_queries);
    desk.packing.turn(desk.gradients, tile.padded, desk.turned_gradients);
    desk.packing.pair(desk.queries, tile.padded, desk.paired_queries);
    desk.packing.pair(desk.gradients, tile.padded, desk.paired_gradients);
    const float* total = data<float>(lse) + (segment.start + token) * shape.heads + head;
    std::fill(desk.lse, desk.lse + PIECE, 0.0f);
    std::fill(desk.mean, desk.mean + PIECE, 0.0f);
    for (int64_t row = 0; row < tile.rows; ++row) {
      desk.lse[row] = total[row * shape.heads];
      desk.mean[row] = loops<E>().inner(desk.out + row * width, desk.gradients + row * width, width);
    }
  }

  // Computes the scores again, one row per key. With s = q·k/√d, p = softmax(s): dv += pᵀ do, ds = p (do·v - o·do),
  // dq += ds k/√d, dk += dsᵀ q/√d.
  void piece_backward(const Desk& desk, const Tile& tile, int64_t piece) const {
    int64_t width = shape.width, padded = tile.padded, columns = desk.packing.columns(), first = piece * PIECE;
    block_product(PIECE, padded, width, {width, PIECE}, false, desk.keys + first * width, desk.turned_queries, desk.scores);
    block_product(PIECE, padded, width, {width, PIECE}, false, desk.values + first * width, desk.turned_gradients,
                  desk.weight_gradients);
    loops<E>().weights_backward(Keys<E>{desk.scores, desk.weight_gradients, desk.weights, desk.slopes},
                                Queries{desk.lse, desk.mean, tile.rows}, tile.seen - first, shape.scale);
    desk.packing.times(PIECE, padded, true, desk.weights, desk.paired_gradients, desk.seen.values + first * columns);
    desk.packing.times(PIECE, padded, true, desk.slopes, desk.paired_queries, desk.seen.keys + first * columns);
    dyad_transpose(desk.slopes, PIECE, desk.turned_slopes, PIECE, PIECE, padded);
    desk.packing.times(padded, PIECE, piece > 0, desk.turned_slopes, desk.paired_keys + first * columns,
                       desk.query_gradients);
  }
};

// Calls the body with a null pointer to the element type of products: Bf16 for bfloat16 tensors of even width on CPUs with AMX
// tiles, otherwise float.
template <typename T, typename Body>
void by_operand(int64_t width, Body&& body) {
  if constexpr (std::is_same_v<T, Bf16>)
    if (width % 2 == 0 && dyad::has_tiles()) return body(static_cast<Bf16*>(nullptr));
  body(static_cast<float*>(nullptr));
}

// Inputs that the profiler records: the queries, and an empty tensor whose first size is the number of visible pairs.
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
      by_operand<T>(shape.width, [&](auto* operand) {
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
      by_operand<T>(shape.width, [&](auto* operand) {
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

// Softmax attention with scale 1/sqrt(width): queries `[tokens, heads, width]`, keys and values `[tokens, kv heads, width]`.
// Returns a new tensor of the queries' shape, owned by the caller. Tensors are on the CPU and of one kind, float32 or bfloat16.
// `layout` is that of segments_of(); the segments cover all tokens.
dyad_error dyad_segmented_attention(at::Tensor* query, at::Tensor* key, at::Tensor* value, const int64_t* layout,
                                    size_t count, at::Tensor** out) {
  return guarded([&] {
    *out = new at::Tensor(
        SegmentedAttention::apply(*query, *key, *value, std::vector<int64_t>(layout, layout + count)));
  });
}

}  // extern "C"
