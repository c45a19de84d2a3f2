// Matrices as the block products of `product.h` want them: by columns, pairs of rows side by side, padded with zeros.
// Those of bfloat16 want a CPU with AVX-512.
#pragma once

#include <cstdint>

#include "scalars.h"

// Whether the CPU has the AVX-512 that block products and these loops are written for.
bool dyad_has_vectors();

// `to[c, r] = from[r, c]`: `[rows, columns]` with rows `stride` apart, into rows `to_stride` apart. Rows are padded with zeros
// to the next multiple of 16.
void dyad_transpose(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t rows, int64_t columns);

// The same of bfloat16, two neighbouring columns as one.
void dyad_transpose_pairs(const Bf16* from, int64_t stride, Bf16* to, int64_t to_stride, int64_t rows, int64_t columns);

// `to[c, r] = from[r, c]` of bfloat16. Rows are padded with zeros to the next multiple of 32.
void dyad_transpose(const Bf16* from, int64_t stride, Bf16* to, int64_t to_stride, int64_t rows, int64_t columns);

// `to[r / 2, c, r % 2] = from[r, c]` of `[rows, columns]`; an odd last row is paired with zeros. Rows of `to` are `width`
// pairs long; what lies behind the columns is zero.
void dyad_pair_rows(const Bf16* from, int64_t stride, Bf16* to, int64_t width, int64_t rows, int64_t columns);

// What is added to the rows of a product: rows `stride` apart, which is 0 where all rows get the same; null where nothing is.
template <typename T>
struct Added {
  const T* rows = nullptr;
  int64_t stride = 0;
  Added from(int64_t row, int64_t column) const {
    return rows == nullptr ? Added{} : Added{rows + row * stride + column, stride};
  }
};

// `to[r, c] = from[r, c] + added[r, c]` in the precision of `to`, which may be what is added.
void dyad_store(const float* from, int64_t stride, Added<Bf16> added, Bf16* to, int64_t to_stride, int64_t rows,
                int64_t columns);
void dyad_store(const float* from, int64_t stride, Added<float> added, float* to, int64_t to_stride, int64_t rows,
                int64_t columns);

// Asks for the cache lines of rows `stride` bytes apart, which are about to be written.
void dyad_fetch(const void* to, int64_t stride, int64_t rows, int64_t bytes);
