// The loops of `rows.h`. This file is compiled once for each instruction set, with the name of its table in DYAD_LOOPS. The anonymous
// namespace keeps the linker from merging the functions of different instruction sets.
#include "rows.h"

#include "lanes.h"

namespace dyad {
namespace {

static_assert(BLOCK_VALUES <= ROOM && PIECE % LANES == 0);

template <typename T>
void norm_rows(const T* x, const T* w, T* y, float* rstd, int64_t rows, Norm norm) {
  for (int64_t row = 0; row < rows; ++row, x += norm.columns, y += norm.columns) {
    Lanes sum{};
    in_blocks(norm.columns, [&](int64_t at, int64_t count) DYAD_BODY {
      Block in = block_at(x + at, count);
      sum += in.a * in.a + in.b * in.b;
    });
    float scale = 1.0f / __builtin_sqrtf(sum_of(sum) / static_cast<float>(norm.columns) + norm.eps);
    rstd[row] = scale;
    in_blocks(norm.columns, [&](int64_t at, int64_t count) DYAD_BODY {
      auto scaled = [&](Lanes x, Lanes w) DYAD_BODY { return rounded<T>(x * scale) * w; };
      put(both(scaled, block_at(x + at, count), block_at(w + at, count)), y + at, count);
    });
  }
}

template <typename T>
void norm_row_backward(NormBackward<T> of, float* dw, Norm norm) {
  float scale = *of.rstd, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < norm.columns; ++i) sum += widen(of.dy[i]) * widen(of.w[i]) * widen(of.x[i]);
  float mean = sum * scale / static_cast<float>(norm.columns);
  // Add the residual in the same loop: a separate one would read the row twice. Without a residual, `x` stands in for it.
  const T* beside = of.beside == nullptr ? of.x : of.beside;
  float has = of.beside == nullptr ? 0.0f : 1.0f;
#pragma omp simd
  for (int64_t i = 0; i < norm.columns; ++i) {
    float h = widen(of.x[i]) * scale, g = widen(of.dy[i]);
    dw[i] += g * h;
    narrow(scale * (g * widen(of.w[i]) - h * mean) + has * widen(beside[i]), of.dx[i]);
  }
}

template <typename T>
void norm_rows_backward(NormBackward<T> of, float* dw, int64_t rows, Norm norm) {
  for (int64_t row = 0; row < rows; ++row) {
    norm_row_backward(of, dw, norm);
    of.x += norm.columns;
    of.dy += norm.columns;
    of.dx += norm.columns;
    ++of.rstd;
    if (of.beside != nullptr) of.beside += norm.columns;
  }
}

template <typename T>
void turn_rows(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, Turn turn) {
  int64_t width = 2 * turn.half;
  for (int64_t token = 0; token < tokens; ++token, cos += width, sin += width)
    for (int64_t head = 0; head < turn.heads; ++head, x += width, y += width)
      in_blocks(turn.half, [&](int64_t at, int64_t count) DYAD_BODY {
        int64_t other = at + turn.half;
        Block a = block_at(x + at, count), b = block_at(x + other, count), c = block_at(cos + at, count);
        Block s = both([&](Lanes s) DYAD_BODY { return turn.sign * s; }, block_at(sin + at, count));
        put(both([](Lanes a, Lanes b, Lanes c, Lanes s) DYAD_BODY { return a * c - b * s; }, a, b, c, s), y + at, count);
        put(both([](Lanes a, Lanes b, Lanes c, Lanes s) DYAD_BODY { return b * c + a * s; }, a, b, c, s), y + other, count);
      });
}

template <typename T>
void gate_values(const T* gate, const T* up, T* y, int64_t count) {
  in_blocks(count, [&](int64_t at, int64_t count) DYAD_BODY {
    auto gated = [](Lanes g, Lanes up) DYAD_BODY { return rounded<T>(g * sigmoid(g)) * up; };
    put(both(gated, block_at(gate + at, count), block_at(up + at, count)), y + at, count);
  });
}

template <typename T>
void gate_values_backward(const T* gate, const T* up, const T* dy, T* dgate, T* dup, int64_t count) {
  in_blocks(count, [&](int64_t at, int64_t count) DYAD_BODY {
    Block g = block_at(gate + at, count), u = block_at(up + at, count), d = block_at(dy + at, count), s = both(sigmoid, g);
    put(both([](Lanes d, Lanes g, Lanes s) DYAD_BODY { return d * rounded<T>(g * s); }, d, g, s), dup + at, count);
    auto gate_slope = [](Lanes d, Lanes u, Lanes g, Lanes s) DYAD_BODY { return d * u * s * (1.0f + g * (1.0f - s)); };
    put(both(gate_slope, d, u, g, s), dgate + at, count);
  });
}

template <typename T>
DYAD_INLINE float row_max(const T* z, int64_t columns) {
  Block most{lanes(widen(z[0])), lanes(widen(z[0]))};
  int64_t at = 0;
  for (; at + BLOCK_VALUES <= columns; at += BLOCK_VALUES) most = both(larger, block_at(z + at), most);
  float max = largest_of(larger(most.a, most.b));
  for (; at < columns; ++at) max = widen(z[at]) > max ? widen(z[at]) : max;
  return max;
}

// Sums over a row of logits z.
struct Sums {
  // Sum of e^(z - max); sum of e^(z - max) times ((z - max) - (r - reference_max)). If a logit is NaN, so are the sums.
  float weights, above;
  // Sums of z - max, of e^(z - max) (z - max), and of e^(2 (z - max)).
  float spread, mass, squares;
};

// Takes the place of minus infinity where it is multiplied by a probability of 0, which would give NaN.
constexpr float LOWEST = -1.0e30f;

// A block of ones for the first `count` values and zeros after them.
template <typename T>
DYAD_INLINE Block ones(int64_t count) {
  T values[BLOCK_VALUES]{};
  for (int64_t i = 0; i < count; ++i) narrow(1.0f, values[i]);
  return block_at(values);
}

// With KEEP, writes the terms e^(z - max) to `terms`, block by block. Without DESCRIBE the last three sums stay 0.
template <bool KEEP, bool COMPARE, bool DESCRIBE, typename T>
DYAD_INLINE Sums add_up(const T* z, float max, const T* r, float reference_max, float* terms, int64_t columns) {
  Lanes weights{}, above{}, spread{}, mass{}, squares{};
  in_blocks(columns, [&](int64_t at, int64_t count) DYAD_BODY {
    Block logits = both([&](Lanes z) DYAD_BODY { return z - max; }, block_at(z + at, count));
    Block kept = both(exponential, logits);
    auto times = [](Lanes a, Lanes b) DYAD_BODY { return a * b; };
    if (count < BLOCK_VALUES) kept = both(times, kept, ones<T>(count));
    weights += kept.a + kept.b;
    auto at_least = [](Lanes x) DYAD_BODY { return larger(x, lanes(LOWEST)); };
    if constexpr (DESCRIBE) {
      Block own = count < BLOCK_VALUES ? both(times, logits, ones<T>(count)) : logits;
      spread += own.a + own.b;
      squares += kept.a * kept.a + kept.b * kept.b;
    }
    if constexpr (COMPARE || DESCRIBE) logits = both(at_least, logits);
    if constexpr (DESCRIBE) mass += kept.a * logits.a + kept.b * logits.b;
    if constexpr (COMPARE) {
      auto below = [&](Lanes r) DYAD_BODY { return at_least(r - reference_max); };
      Block others = both(below, block_at(r + at, count));
      above += kept.a * (logits.a - others.a) + kept.b * (logits.b - others.b);
    }
    if constexpr (KEEP) put(kept, terms + at);
  });
  return {sum_of(weights), sum_of(above), sum_of(spread), sum_of(mass), sum_of(squares)};
}

DYAD_INLINE double log_of(float sum) { return __builtin_log(static_cast<double>(sum)); }

// softmax(z) - onehot(target).
template <typename T>
DYAD_INLINE void to_errors(T* z, const float* terms, float scale, int64_t target, float target_term, int64_t columns) {
  in_blocks(columns, [&](int64_t at, int64_t count) DYAD_BODY {
    put(both([&](Lanes term) DYAD_BODY { return scale * term; }, block_at(terms + at)), z + at, count);
  });
  narrow(scale * target_term - 1.0f, z[target]);
}

// Whether the target is the first of the largest logits.
template <typename T>
DYAD_INLINE bool is_top1(const T* z, int64_t target, float max) {
  if (!(widen(z[target]) >= max)) return false;
  for (int64_t at = 0; at < target; ++at)
    if (widen(z[at]) == max) return false;
  return true;
}

// `terms` is a buffer for a row, in whole blocks.
template <bool KEEP, bool COMPARE, bool DESCRIBE, typename T>
DYAD_INLINE void score_row(const Tile<T>& tile, int64_t row, float* terms) {
  T* z = tile.policy + row * tile.columns;
  const T* r = COMPARE ? tile.reference + row * tile.columns : nullptr;
  int64_t target = tile.targets[row];
  float max = row_max(z, tile.columns), reference_max = COMPARE ? row_max(r, tile.columns) : 0.0f;
  Sums sums = add_up<KEEP, COMPARE, DESCRIBE>(z, max, r, reference_max, terms, tile.columns);
  float kl = 0.0f;
  double log_sum = log_of(sums.weights);
  tile.logps[row] = widen(z[target]) - (max + log_sum);
  if constexpr (COMPARE) {
    double reference_log_sum = log_of(add_up<false, false, false>(r, reference_max, r, reference_max, terms, tile.columns).weights);
    tile.reference_logps[row] = widen(r[target]) - (reference_max + reference_log_sum);
    // The mean of log p - log q under p. The maxima are left out, so that no large numbers are subtracted from each other.
    kl = static_cast<float>(static_cast<double>(sums.above / sums.weights) - (log_sum - reference_log_sum));
  }
  if constexpr (DESCRIBE)
    tile.facts[row] = {kl, max + sums.spread / static_cast<float>(tile.columns),
                       static_cast<float>(log_sum - static_cast<double>(sums.mass / sums.weights)),
                       static_cast<float>(log_of(sums.squares) - 2.0 * log_sum), is_top1(z, target, max) ? 1.0f : 0.0f};
  if constexpr (KEEP) {
    float target_term = exponential(lanes(widen(z[target]) - max))[0];
    to_errors(z, terms, 1.0f / sums.weights, target, target_term, tile.columns);
  }
}

template <bool KEEP, bool COMPARE, typename T>
void score_with(const Tile<T>& tile, int64_t begin, int64_t end, float* terms) {
  for (int64_t row = begin; row < end; ++row)
    if (tile.facts == nullptr)
      score_row<KEEP, COMPARE, false>(tile, row, terms);
    else
      score_row<KEEP, COMPARE, true>(tile, row, terms);
}

template <typename T>
void score_rows(const Tile<T>& tile, int64_t begin, int64_t end, float* terms) {
  bool keep = terms != nullptr, compare = tile.reference != nullptr;
  if (keep)
    (compare ? score_with<true, true, T> : score_with<true, false, T>)(tile, begin, end, terms);
  else
    (compare ? score_with<false, true, T> : score_with<false, false, T>)(tile, begin, end, terms);
}

// Less than any score, but finite.
constexpr float NOTHING = -3.0e38f;

// Indices of lanes.
constexpr float PLACES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
DYAD_INLINE Lanes places_from(int64_t first) { return lanes_at(PLACES) + static_cast<float>(first); }

// Calls the body for each register of scores of the first `count` pieces, with the index of its first key and its offset in memory.
template <typename Body>
DYAD_INLINE void in_pieces(int64_t count, Body&& body) {
  for (int64_t piece = 0; piece < count; ++piece)
    for (int64_t at = 0; at < PIECE; at += LANES) body(piece * PIECE + at, piece * APART + at);
}

template <typename E>
Normaliser weigh(const float* scores, E* weights, int64_t seen, int64_t pieces_seen, float scale) {
  Lanes largest = lanes(NOTHING), sum{}, end = lanes(static_cast<float>(seen));
  in_pieces(pieces_seen, [&](int64_t place, int64_t at) DYAD_BODY {
    largest = larger(places_from(place) < end ? lanes_at(scores + at) : lanes(NOTHING), largest);
  });
  float top = scale * largest_of(largest);
  in_pieces(pieces_seen, [&](int64_t place, int64_t at) DYAD_BODY {
    Lanes weight = exponential(scale * lanes_at(scores + at) - top);
    weight = places_from(place) < end ? weight : Lanes{};
    sum += weight;
    put(weight, weights + at);
  });
  return {top, sum_of(sum)};
}

template <typename E>
void weights_backward(Keys<E> keys, Queries queries, int64_t seen, float scale) {
  Lanes end = lanes(static_cast<float>(queries.count));
  for (int64_t key = 0; key < PIECE; ++key) {
    Lanes begin = lanes(static_cast<float>(key - seen + 1));
    for (int64_t query = 0; query < PIECE; query += LANES) {
      int64_t at = key * PIECE + query;
      Lanes place = places_from(query), p = exponential(scale * lanes_at(keys.scores + at) - lanes_at(queries.lse + query));
      p = place < begin ? Lanes{} : place < end ? p : Lanes{};
      put(p, keys.weights + at);
      put(p * (lanes_at(keys.gradients + at) - lanes_at(queries.mean + query)), keys.slopes + at);
    }
  }
}

template <typename E>
float inner(const E* a, const E* b, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += widen(a[i]) * widen(b[i]);
  return sum;
}

template <typename T, typename E>
void load_rows(const T* from, int64_t stride, E* to, int64_t rows, int64_t width) {
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
void store_row(const float* from, float scale, T* to, int64_t width) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) narrow(scale * from[i], to[i]);
}

template <typename T>
void add_values(float* total, const T* part, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) total[i] += widen(part[i]);
}

template <typename T>
constexpr Loops<T> compiled() {
  return {
      .norm = norm_rows<T>,
      .norm_backward = norm_rows_backward<T>,
      .turn = turn_rows<T>,
      .gate = gate_values<T>,
      .gate_backward = gate_values_backward<T>,
      .score = score_rows<T>,
      .weigh = weigh<T>,
      .weights_backward = weights_backward<T>,
      .inner = inner<T>,
      .load = load_rows<T, T>,
      .load_wide = load_rows<T, float>,
      .store = store_row<T>,
      .add = add_values<T>,
  };
}

}  // namespace

extern const AllLoops DYAD_LOOPS;
const AllLoops DYAD_LOOPS{LANES, compiled<float>(), compiled<Bf16>()};

}  // namespace dyad
