// Packs matrices for the block products of `product.h`: transposes them, interleaves pairs of rows, pads with zeros. The functions
// for bfloat16 need a CPU with AVX-512.
#pragma once

#include <cstdint>

#include "scalars.h"

// Whether the CPU has the AVX-512 instructions that block products and these loops need.
bool dyad_has_vectors();

// `to[c, r] = from[r, c]`: `[rows, columns]` with rows `stride` apart, into rows `to_stride` apart. Rows are padded with zeros
// to the next multiple of 16.
void dyad_transpose(const float* from, int64_t stride, float* to, int64_t to_stride, int64_t rows, int64_t columns);

// The same for bfloat16; two neighbouring columns stay together as one 32-bit value.
void dyad_transpose_pairs(const Bf16* from, int64_t stride, Bf16* to, int64_t to_stride, int64_t rows, int64_t columns);

// `to[c, r] = from[r, c]` for bfloat16. Rows are padded with zeros to the next multiple of 32.
void dyad_transpose(const Bf16* from, int64_t stride, Bf16* to, int64_t to_stride, int64_t rows, int64_t columns);

// `to[r / 2, c, r % 2] = from[r, c]` of `[rows, columns]`; an odd last row is paired with zeros. Rows of `to` are `width`
// pairs long and zero after the columns.
void dyad_pair_rows(const Bf16* from, int64_t stride, Bf16* to, int64_t width, int64_t rows, int64_t columns);

// Values to add to the rows of a product. Rows are `stride` apart; a stride of 0 adds the same values to all rows. `rows` is null if
// there is nothing to add.
template <typename T>
struct Added {
  const T* rows = nullptr;
  int64_t stride = 0;
  Added from(int64_t row, int64_t column) const {
    return rows == nullptr ? Added{} : Added{rows + row * stride + column, stride};
  }
};

// `to[r, c] = from[r, c] + added[r, c]`, rounded to the precision of `to`. `added` may be `to` itself.
void dyad_store(const float* from, int64_t stride, Added<Bf16> added, Bf16* to, int64_t to_stride, int64_t rows,
                int64_t columns);
void dyad_store(const float* from, int64_t stride, Added<float> added, float* to, int64_t to_stride, int64_t rows,
                int64_t columns);

// Prefetches for writing the cache lines of rows that are `stride` bytes apart.
void dyad_fetch(const void* to, int64_t stride, int64_t rows, int64_t bytes);
