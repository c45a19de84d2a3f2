// Vectors as wide as the registers of the instruction set that a file is compiled for. Includes no libtorch header, and forces
// inlining: if several files contain an inline function, the linker keeps any one of them, perhaps for the wrong instruction set.
#pragma once

#include <type_traits>

#include "scalars.h"

#if defined(__AVX512F__)
#define DYAD_LANES 16
#elif defined(__AVX__)
#define DYAD_LANES 8
#else
#define DYAD_LANES 4
#endif
constexpr int64_t LANES = DYAD_LANES;

// A register of float32 values; the same bits as uint32; as many uint16 values.
typedef float Lanes __attribute__((vector_size(4 * DYAD_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * DYAD_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * DYAD_LANES)));

// Inlines a lambda into the loop that calls it.
#define DYAD_BODY __attribute__((always_inline))

DYAD_INLINE Words words_of(Lanes lanes) { return reinterpret_cast<Words>(lanes); }
DYAD_INLINE Lanes lanes_of(Words words) { return reinterpret_cast<Lanes>(words); }
DYAD_INLINE Lanes lanes(float value) { return Lanes{} + value; }
DYAD_INLINE Lanes lanes_at(const float* from) {
  Lanes values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

// Maximum and minimum. If `a` is NaN they return `b`, so a NaN in `b` propagates.
DYAD_INLINE Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
DYAD_INLINE Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }

DYAD_INLINE float sum_of(Lanes lanes) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
DYAD_INLINE float largest_of(Lanes lanes) {
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// The upper half of each word is the value in bfloat16: rounded to nearest, ties to even; NaN stays NaN.
DYAD_INLINE Words rounded_words(Lanes values) {
  Words bits = words_of(values), near = bits + 0x7fff + ((bits >> 16) & 1);
  return values == values ? near : Words{} + 0x7fc00000u;
}
// Values rounded to T.
template <typename T>
DYAD_INLINE Lanes rounded(Lanes values) {
  if constexpr (std::is_same_v<T, float>)
    return values;
  else
    return lanes_of(rounded_words(values) & 0xffff0000u);
}

DYAD_INLINE void put(Lanes values, float* to) { std::memcpy(to, &values, sizeof values); }
DYAD_INLINE void put(Lanes values, Bf16* to) {
  Halves halves = __builtin_convertvector(rounded_words(values) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// Neighbouring values in two registers. For bfloat16 `a` has the values at even and `b` those at odd places, because one shift and one
// mask unpack them so; for float32 `a` is the first and `b` the second half. Combine only blocks of the same kind.
struct Block {
  Lanes a, b;
};
constexpr int64_t BLOCK_VALUES = 2 * LANES;

DYAD_INLINE Block block_at(const float* from) { return {lanes_at(from), lanes_at(from + LANES)}; }
DYAD_INLINE Block block_at(const Bf16* from) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  return {lanes_of(pairs << 16), lanes_of(pairs & 0xffff0000u)};
}
DYAD_INLINE void put(Block block, float* to) {
  put(block.a, to);
  put(block.b, to + LANES);
}
DYAD_INLINE void put(Block block, Bf16* to) {
  Words pairs = rounded_words(block.a) >> 16 | (rounded_words(block.b) & 0xffff0000u);
  std::memcpy(to, &pairs, sizeof pairs);
}
// Loads the first `count` values and pads with zeros.
template <typename T>
DYAD_INLINE Block block_at(const T* from, int64_t count) {
  if (count == BLOCK_VALUES) return block_at(from);
  T part[BLOCK_VALUES]{};
  std::memcpy(part, from, count * sizeof(T));
  return block_at(part);
}
template <typename T>
DYAD_INLINE void put(Block block, T* to, int64_t count) {
  if (count == BLOCK_VALUES) return put(block, to);
  T part[BLOCK_VALUES];
  put(block, part);
  std::memcpy(to, part, count * sizeof(T));
}

// Applies a function of lanes to both registers of blocks.
template <typename Body, typename... Blocks>
DYAD_INLINE Block both(Body&& body, Blocks... blocks) {
  return {body(blocks.a...), body(blocks.b...)};
}
// Calls the body with the start of each block and its number of values; only the last block may be shorter.
template <typename Body>
DYAD_INLINE void in_blocks(int64_t count, Body&& body) {
  int64_t at = 0;
  for (; at + BLOCK_VALUES <= count; at += BLOCK_VALUES) body(at, BLOCK_VALUES);
  if (at < count) body(at, count - at);
}

// e^x to about one unit in the last place, by Cephes' polynomial. `x` is clamped to where e^x is finite and normal; NaN stays NaN.
// Adding 1.5 · 2^23 rounds to an integer, which is then in the lowest bits.
DYAD_INLINE Lanes exponential(Lanes x) {
  constexpr float whole = 12582912.0f;
  x = smaller(lanes(88.3f), larger(lanes(-87.3f), x));
  Lanes shifted = x * 1.44269504088896341f + whole, n = shifted - whole;
  Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * lanes_of((words_of(shifted) + 127) << 23);
}

DYAD_INLINE Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exponential(-x)); }
