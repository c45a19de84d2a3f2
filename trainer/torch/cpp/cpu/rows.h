// Loops over rows of values on the CPU, compiled for several instruction sets. All arithmetic is float32.
#pragma once

#include "scalars.h"

namespace dyad {

struct Norm {
  int64_t columns;
  float eps;
};

// All arrays are `[rows, columns]`, except `w` `[columns]` and `rstd` `[rows]`. `beside` is the gradient of the residual, which is added
// to `dx`; it may be null.
template <typename T>
struct NormBackward {
  const T *x, *w, *dy, *beside;
  const float* rstd;
  T* dx;
};

// A rotation of `[tokens, heads, 2 half]`: each pair (i, i + half) of a head is rotated by its token's angle; backwards if `sign` is -1.
struct Turn {
  int64_t heads;
  int64_t half;
  float sign;
};

// Extra values after a row's buffer that loops may overwrite.
constexpr int64_t ROOM = 32;

// What is stored about each row of logits z with p = softmax(z), beside the log-probability of its target.
struct RowFacts {
  // KL(p || reference); 0 without a reference.
  float kl;
  // The mean of z.
  float mean_logit;
  // The entropy of p.
  float entropy;
  // The logarithm of the sum of p².
  float log_sum_sq;
  // 1 if the target is the first of the largest logits, else 0.
  float is_top1;
};

// A tile of logits to score.
template <typename T>
struct Tile {
  // Logits, which errors overwrite if they are kept. `[rows, columns]`
  T* policy;
  // Null without a reference. `[rows, columns]`
  const T* reference;
  const int64_t* targets;
  double* logps;
  double* reference_logps;
  // Null if they are not wanted.
  RowFacts* facts;
  int64_t columns;
};

// Keys come in pieces of `PIECE`. The scores of one query, and values derived from them, are stored in pieces `APART` values apart.
constexpr int64_t PIECE = 64, APART = PIECE * PIECE;

struct Normaliser {
  float top, sum;
};

// The queries of a tile: log-sum-exp and `o·do` (`mean`) of each, and their number.
struct Queries {
  const float *lse, *mean;
  int64_t count;
};

// For the keys of a piece, one row of `PIECE` queries each. Inputs: scores and gradients of the weights. Outputs: weights and
// gradients of the scores (`slopes`).
template <typename E>
struct Keys {
  const float *scores, *gradients;
  E *weights, *slopes;
};

// The loops over values of T.
template <typename T>
struct Loops {
  // `y = x rstd · w` with `rstd = 1 / sqrt(mean(x²) + eps)`, which is also stored. `x rstd` is rounded to T.
  void (*norm)(const T* x, const T* w, T* y, float* rstd, int64_t rows, Norm norm);
  // With h = x·rstd and g = dy·w: dx = rstd (g - h mean(g h)) + beside, dw += sum over rows of dy·h.
  void (*norm_backward)(NormBackward<T> of, float* dw, int64_t rows, Norm norm);
  void (*turn)(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, Turn turn);
  // `silu(gate) · up`; `silu(gate)` is rounded to T.
  void (*gate)(const T* gate, const T* up, T* y, int64_t count);
  void (*gate_backward)(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t count);
  // Scores rows `[begin, end)` of a tile. `terms` is a buffer for a row and ROOM more values; if it is null, the logits stay.
  void (*score)(const Tile<T>& tile, int64_t begin, int64_t end, float* terms);
  // Turns the scores of one query into weights `exp(scale s - top)`, in as many pieces as its tile sees. Keys after the first `seen`
  // get weight zero. Returns `top`, the largest scaled score, and the sum of the weights.
  Normaliser (*weigh)(const float* scores, T* weights, int64_t seen, int64_t pieces_seen, float scale);
  // `p = exp(scale s - lse)` and `ds = p (dp - o·do)` for queries that see a key, zero for the others. The first query sees the
  // first `seen` keys of the piece.
  void (*weights_backward)(Keys<T> keys, Queries queries, int64_t seen, float scale);
  float (*inner)(const T* a, const T* b, int64_t width);
  // Copies the rows of one head, which are `stride` apart.
  void (*load)(const T* from, int64_t stride, T* to, int64_t rows, int64_t width);
  void (*load_wide)(const T* from, int64_t stride, float* to, int64_t rows, int64_t width);
  void (*store)(const float* from, float scale, T* to, int64_t width);
  void (*add)(float* total, const T* part, int64_t count);
};

struct AllLoops {
  // Float32 values per register of the instruction set that they were compiled for.
  int64_t lanes;
  Loops<float> float32;
  Loops<Bf16> bfloat16;
};

// The loops for this CPU.
const AllLoops& all_loops();

template <typename T>
const Loops<T>& loops() {
  if constexpr (sizeof(T) == sizeof(float))
    return all_loops().float32;
  else
    return all_loops().bfloat16;
}

}  // namespace dyad
