// Loops over rows of values on the CPU, compiled once for each set of instructions that is worth it. All arithmetic is float32.
#pragma once

#include "scalars.h"

namespace dyad {

struct Norm {
  int64_t columns;
  float eps;
};

// Rows `[rows, columns]` but for weights `[columns]` and `rstd` `[rows]`. `beside` is what dx is added to, or null.
template <typename T>
struct NormBackward {
  const T *x, *w, *dy, *beside;
  const float* rstd;
  T* dx;
};

// `[tokens, heads, 2 half]`: the pair (i, i + half) of every head turns by its token's angle, backwards where sign is -1.
struct Turn {
  int64_t heads;
  int64_t half;
  float sign;
};

// Values that loops may write behind a row where they have been given room.
constexpr int64_t ROOM = 32;

// A tile of logits to be scored.
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

// Scores of one query, or products made of them: pieces of `PIECE` keys, `APART` values apart.
constexpr int64_t PIECE = 64, APART = PIECE * PIECE;

struct Normaliser {
  float top, sum;
};

// The queries of a tile: log-sum-exps and `o·do` of each, and how many there are.
struct Queries {
  const float *lse, *mean;
  int64_t count;
};

// Of the keys of a piece, a row of `PIECE` queries for each: scores, the gradients of weights, and where weights and the
// gradients of scores go.
template <typename E>
struct Keys {
  const float *scores, *gradients;
  E *weights, *slopes;
};

// The loops over values of T.
template <typename T>
struct Loops {
  // `y = x rstd · w` with `rstd = 1 / sqrt(mean(x²) + eps)`, which is kept. The product with rstd is rounded to T.
  void (*norm)(const T* x, const T* w, T* y, float* rstd, int64_t rows, Norm norm);
  // With h = x·rstd and g = dy·w: dx = rstd (g - h mean(g h)) + beside, dw += sum over rows of dy·h.
  void (*norm_backward)(NormBackward<T> of, float* dw, int64_t rows, Norm norm);
  void (*turn)(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, Turn turn);
  // `silu(gate) · up`; the first factor is rounded to T.
  void (*gate)(const T* gate, const T* up, T* y, int64_t count);
  void (*gate_backward)(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t count);
  // Rows `[begin, end)` of a tile. `terms` has room for a row and ROOM more; where it is null, the logits stay.
  void (*score)(const Tile<T>& tile, int64_t begin, int64_t end, float* terms);
  // Scores of one query become weights `exp(scale s - top)`, in as many pieces as its tile sees; zero for keys behind those
  // seen.
  Normaliser (*weigh)(const float* scores, T* weights, int64_t seen, int64_t pieces_seen, float scale);
  // `p = exp(scale s - lse)` and `ds = p (dp - o·do)` for queries that see a key, zero for the others. The first query sees the
  // first `seen` keys of the piece.
  void (*weights_backward)(Keys<T> keys, Queries queries, int64_t seen, float scale);
  float (*inner)(const T* a, const T* b, int64_t width);
  // Rows of one head from rows `stride` apart.
  void (*load)(const T* from, int64_t stride, T* to, int64_t rows, int64_t width);
  void (*load_wide)(const T* from, int64_t stride, float* to, int64_t rows, int64_t width);
  void (*store)(const float* from, float scale, T* to, int64_t width);
  void (*add)(float* total, const T* part, int64_t count);
};

struct AllLoops {
  // Values in a register of the instructions that they were compiled for.
  int64_t lanes;
  Loops<float> float32;
  Loops<Bf16> bfloat16;
};

// Those for this CPU.
const AllLoops& all_loops();

template <typename T>
const Loops<T>& loops() {
  if constexpr (sizeof(T) == sizeof(float))
    return all_loops().float32;
  else
    return all_loops().bfloat16;
}

}  // namespace dyad
