// Functions of this file enable AVX-512 by attributes, not by compiler flags for the file: flags would also compile inline functions
// of headers for AVX-512, and the linker might use those copies on every machine.
#include "pack.h"

#include <algorithm>

// GCC 12 warns about its own `_mm512_undefined_epi32`.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#define DYAD_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
// Every CPU with AMX tiles for bfloat16 has these instructions too.
#define DYAD_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define DYAD_AVX512_INLINE DYAD_AVX512 static inline __attribute__((always_inline))

namespace {

// A mask of the first `count` lanes.
__mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }

// Transposes a 16 by 16 matrix of 32-bit values, one row per register.
DYAD_AVX512_INLINE void turn(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

DYAD_AVX512 void transpose_words(const uint32_t* from, int64_t stride, uint32_t* to, int64_t to_stride, int64_t rows,
                                 int64_t columns) {
  for (int64_t row = 0; row < rows; row += 16)
    for (int64_t column = 0; column < columns; column += 16) {
      const uint32_t* at = from + row * stride + column;
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = row + i < rows ? _mm512_maskz_loadu_epi32(first(columns - column), at + i * stride) : _mm512_setzero_si512();
      turn(r);
      uint32_t* out = to + column * to_stride + row;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (column + i < columns) _mm512_storeu_si512(out + i * to_stride, r[i]);
    }
}

void transpose_plain(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) to[column * to_stride + row] = from[row * stride + column];
    for (int64_t row = rows; row % 16 != 0; ++row) to[column * to_stride + row] = 0.0f;
  }
}

// Interleaves 16 columns of two rows into pairs; without an odd row the second half of each pair is zero.
DYAD_AVX512_INLINE __m512i pairs(const uint16_t* even, const uint16_t* odd, __mmask16 mask) {
  __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  if (odd == nullptr) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd)), 16));
}

DYAD_AVX512_INLINE __m512i pairs_of(const uint16_t* from, int64_t stride, int64_t row, int64_t rows, __mmask16 mask) {
  if (row >= rows) return _mm512_setzero_si512();
  return pairs(from + row * stride, row + 1 < rows ? from + (row + 1) * stride : nullptr, mask);
}

DYAD_AVX512 void transpose_halves(const uint16_t* from, int64_t stride, uint16_t* to, int64_t to_stride, int64_t rows,
                                  int64_t columns) {
  for (int64_t column = 0; column < columns; column += 16)
    for (int64_t row = 0; row < rows; row += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = pairs_of(from + column, stride, row + 2 * i, rows, first(columns - column));
      turn(r);
      uint16_t* out = to + column * to_stride + row;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (column + i < columns) _mm512_storeu_si512(out + i * to_stride, r[i]);
    }
}

DYAD_AVX512_INLINE __m512 widened(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

}  // namespace

bool dyad_has_vectors() {
  static const bool has =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has;
}

void dyad_transpose(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  if (!dyad_has_vectors()) return transpose_plain(from, stride, to, to_stride, rows, columns);
  transpose_words(reinterpret_cast<const uint32_t*>(from), stride, reinterpret_cast<uint32_t*>(to), to_stride, rows, columns);
}

void dyad_transpose_pairs(const Bf16* from, int64_t stride, Bf16* to, int64_t to_stride, int64_t rows, int64_t columns) {
  transpose_words(reinterpret_cast<const uint32_t*>(from), stride / 2, reinterpret_cast<uint32_t*>(to), to_stride, rows,
                  columns / 2);
}

void dyad_transpose(const Bf16* from, int64_t stride, Bf16* to, int64_t to_stride, int64_t rows, int64_t columns) {
  transpose_halves(&from->bits, stride, &to->bits, to_stride, rows, columns);
}

DYAD_AVX512 void dyad_pair_rows(const Bf16* from, int64_t stride, Bf16* to, int64_t width, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; row += 2, to += 2 * width)
    for (int64_t column = 0; column < width; column += 16)
      _mm512_storeu_si512(&to[2 * column].bits,
                          pairs_of(&from->bits + column, stride, row, rows, first(columns - column)));
}

DYAD_AVX512_BF16 void dyad_store(const float* from, int64_t stride, Added<Bf16> added, Bf16* to, int64_t to_stride,
                                 int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += to_stride, added = added.from(1, 0))
    for (int64_t column = 0; column < columns; column += 16) {
      __mmask16 mask = first(columns - column);
      __m512 value = _mm512_maskz_loadu_ps(mask, from + column);
      if (added.rows != nullptr)
        value = _mm512_add_ps(value, widened(_mm256_maskz_loadu_epi16(mask, added.rows + column)));
      _mm256_mask_storeu_epi16(to + column, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
    }
}

void dyad_store(const float* from, int64_t stride, Added<float> added, float* to, int64_t to_stride, int64_t rows,
                int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, from += stride, to += to_stride, added = added.from(1, 0)) {
    if (added.rows == nullptr) {
      std::copy_n(from, columns, to);
      continue;
    }
#pragma omp simd
    for (int64_t column = 0; column < columns; ++column) to[column] = from[column] + added.rows[column];
  }
}

__attribute__((target("prfchw"))) void dyad_fetch(const void* to, int64_t stride, int64_t rows, int64_t bytes) {
  constexpr int64_t LINE = 64;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t at = 0; at < bytes; at += LINE)
      __builtin_prefetch(static_cast<const char*>(to) + row * stride + at, /*to write*/ 1, /*into the second level*/ 2);
}
