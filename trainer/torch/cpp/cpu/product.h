// Matrix products in blocks that stay in a core's L2 cache, by libtorch's block product (oneDNN's brgemm). Blocks have only a few
// shapes for any number of tokens, so that oneDNN compiles few kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include "mkl.h"
#include "pack.h"

namespace dyad {

// Columns of a packed panel.
constexpr int64_t PANEL = 64;
// Rows of a block. A smaller last block is padded to a multiple of BLOCK_STEP.
constexpr int64_t BLOCK = 64;
constexpr int64_t BLOCK_STEP = 16;
// Terms that one block product sums.
constexpr int64_t DEPTH = 512;
// Terms of the packed panels that are kept at a time.
constexpr int64_t SLAB = 8 * DEPTH;
// Bytes of panels that stay in cache during the loop over blocks of rows.
constexpr int64_t PANEL_BYTES = 1 << 20;

constexpr int64_t pieces(int64_t total, int64_t piece) { return (total + piece - 1) / piece; }
constexpr int64_t rounded_up(int64_t value, int64_t step) { return pieces(value, step) * step; }

// A thread's buffer, kept between calls; grows on demand.
template <typename T>
class Scratch {
 public:
  T* at_least(int64_t values) {
    if (values > values_) {
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, rounded_up(values * static_cast<int64_t>(sizeof(T)), 64))));
      if (memory_ == nullptr) throw std::bad_alloc();
      values_ = values;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t values_ = 0;
};

struct Strides {
  int64_t a, c;
};

// Row-major `c[rows, columns] (+)= a[rows, depth] · panel[depth, columns]`, by libtorch's block product.
inline void brgemm(int64_t rows, int64_t columns, int64_t depth, Strides strides, bool add, const float* a, const float* panel,
                   float* c) {
  at::native::cpublas::brgemm(rows, columns, depth, strides.a, PANEL, strides.c, add, a, panel, c, /*is_vnni=*/false);
}
inline void brgemm(int64_t rows, int64_t columns, int64_t depth, Strides strides, bool add, const Bf16* a, const Bf16* panel,
                   float* c) {
  at::native::cpublas::brgemm(rows, columns, depth, strides.a, PANEL, strides.c, add,
                              reinterpret_cast<const at::BFloat16*>(a), reinterpret_cast<const at::BFloat16*>(panel), c,
                              /*is_vnni=*/true);
}

// Whether brgemm runs: oneDNN may be configured not to use instructions that the CPU has.
template <typename T>
bool runs() {
  std::vector<T> a(BLOCK * DEPTH), panel(DEPTH * PANEL);
  std::vector<float> c(BLOCK * PANEL);
  try {
    for (int64_t depth : {int64_t{2}, BLOCK_STEP, DEPTH})
      brgemm(BLOCK, PANEL, depth, {DEPTH, PANEL}, true, a.data(), panel.data(), c.data());
  } catch (const std::exception&) {
    return false;
  }
  if constexpr (std::is_same_v<T, Bf16>) at::native::cpublas::brgemm_release();
  return true;
}

// Whether the block product of float32 runs.
inline bool has_blocks() {
  static const bool has = dyad_has_vectors() && runs<float>();
  return has;
}
// Whether the block product of bfloat16 runs on AMX tiles.
inline bool has_tiles() {
  static const bool has =
      dyad_has_vectors() && __builtin_cpu_supports("avx512bf16") && at::cpu::init_amx() && runs<Bf16>();
  return has;
}

// As brgemm(), or by MKL for float32 if brgemm does not run. bfloat16 needs has_tiles() and an even depth.
inline void block_product(int64_t rows, int64_t columns, int64_t depth, Strides strides, bool add, const float* a,
                          const float* panel, float* c) {
  if (has_blocks()) return brgemm(rows, columns, depth, strides, add, a, panel, c);
  multiply("N", "N", columns, rows, depth, panel, PANEL, a, strides.a, add ? 1.0f : 0.0f, c, strides.c);
}
inline void block_product(int64_t rows, int64_t columns, int64_t depth, Strides strides, bool add, const Bf16* a,
                          const Bf16* panel, float* c) {
  brgemm(rows, columns, depth, strides, add, a, panel, c);
}

// Releases the AMX tile registers when a thread's part is done, because other code configures them differently.
template <typename T>
struct Tiles {
  ~Tiles() {
    if constexpr (std::is_same_v<T, Bf16>) at::native::cpublas::brgemm_release();
  }
};

// The right side of a product: `[depth, columns]`, or `[columns, depth]` if `turned`.
template <typename T>
struct Right {
  const T* values;
  int64_t depth, columns;
  bool turned;

  // Packs terms `[from, from + count)` of one panel. If `count` is odd, the second half of the last pair is zero.
  void pack(int64_t panel, int64_t from, int64_t count, T* to) const {
    int64_t column = panel * PANEL, width = std::min(PANEL, columns - column);
    if (turned)
      pack_turned(values + column * depth + from, width, count, to);
    else
      pack_straight(values + from * columns + column, width, count, to);
  }

 private:
  void pack_turned(const T* from, int64_t width, int64_t count, T* to) const {
    if (width <= PANEL - 16) std::fill(to, to + count * PANEL, T{});
    if constexpr (std::is_same_v<T, Bf16>)
      dyad_transpose_pairs(from, depth, to, PANEL, width, count);
    else
      dyad_transpose(from, depth, to, PANEL, width, count);
  }
  void pack_straight(const T* from, int64_t width, int64_t count, T* to) const {
    if constexpr (std::is_same_v<T, Bf16>) {
      dyad_pair_rows(from, columns, to, PANEL, count, width);
    } else {
      if (width < PANEL) std::fill(to, to + count * PANEL, 0.0f);
      dyad_store(from, columns, Added<float>{}, to, PANEL, count, width);
    }
  }
};

// `y[rows, columns] = a[rows, depth] · right + added`.
template <typename T>
class Product {
 public:
  Product(const T* a, int64_t rows, Right<T> right, Added<T> added, T* y)
      : a_(a), rows_(rows), right_(right), added_(added), y_(y) {}

  // With many rows each thread takes rows as elementwise kernels do, and finds them in its cache. With few rows threads divide the
  // panels too, because it would not pay that each thread packs the whole right side.
  void run() const {
    if (rows_ >= OWN_ROWS * at::get_num_threads())
      at::parallel_for(0, pieces(rows_, BLOCK_STEP), 1, [&](int64_t begin, int64_t end) {
        auto own = of_rows(begin * BLOCK_STEP, std::min(end * BLOCK_STEP, rows_));
        own.part(0, own.panels() * own.blocks());
      });
    else
      at::parallel_for(0, panels() * blocks(), 1, [&](int64_t begin, int64_t end) { part(begin, end); });
  }

 private:
  // Rows per thread from which it pays that each thread packs the whole right side.
  static constexpr int64_t OWN_ROWS = 1024;

  const T* a_;
  int64_t rows_;
  Right<T> right_;
  Added<T> added_;
  T* y_;

  Product of_rows(int64_t from, int64_t to) const {
    return {a_ + from * right_.depth, to - from, right_, added_.from(from, 0), y_ + from * right_.columns};
  }

  int64_t blocks() const { return pieces(rows_, BLOCK); }
  int64_t panels() const { return pieces(right_.columns, PANEL); }
  int64_t slab() const { return std::min(right_.depth, SLAB); }

  // Neighbouring panels.
  struct Group {
    int64_t first, count;
  };
  // A thread's buffers and its tasks `[begin, end)`.
  struct Desk {
    T *panels, *last_rows;
    float* sums;
    int64_t begin, end;
  };

  // Computes a thread's tasks: pairs (panel, block), panel after panel.
  void part(int64_t begin, int64_t end) const {
    thread_local Scratch<T> panels_room, rows_room;
    thread_local Scratch<float> sums_room;
    Tiles<T> tiles;
    int64_t first = begin / blocks(), last = (end - 1) / blocks() + 1;
    int64_t most = std::clamp<int64_t>(PANEL_BYTES / (PANEL * slab() * static_cast<int64_t>(sizeof(T))), 1, last - first);
    bool whole = slab() == right_.depth;
    Desk desk{panels_room.at_least(most * PANEL * rounded_up(slab(), 2)), nullptr,
              sums_room.at_least(whole ? BLOCK * PANEL : most * PANEL * blocks() * BLOCK), begin, end};
    desk.last_rows = last_rows(rows_room);
    for (int64_t panel = first; panel < last; panel += most) sweep({panel, std::min(most, last - panel)}, desk);
  }

  // A copy of the last block, padded with rows of zeros to a size that kernels support; null if it needs no padding.
  T* last_rows(Scratch<T>& room) const {
    int64_t left = rows_ % BLOCK;
    if (left % BLOCK_STEP == 0) return nullptr;
    int64_t depth = right_.depth, padded = rounded_up(left, BLOCK_STEP);
    T* to = room.at_least(padded * depth);
    std::copy_n(a_ + (rows_ - left) * depth, left * depth, to);
    std::fill(to + left * depth, to + padded * depth, T{});
    return to;
  }

  void sweep(Group group, const Desk& desk) const {
    int64_t depth = right_.depth, step = slab();
    for (int64_t from = 0; from < depth; from += step) {
      int64_t count = std::min(step, depth - from), packed = PANEL * rounded_up(step, 2);
      for (int64_t i = 0; i < group.count; ++i) right_.pack(group.first + i, from, count, desk.panels + i * packed);
      for (int64_t block = 0; block < blocks(); ++block)
        for (int64_t i = 0; i < group.count; ++i) {
          int64_t task = (group.first + i) * blocks() + block;
          if (task < desk.begin || task >= desk.end) continue;
          float* sums = desk.sums + (step == depth ? 0 : (block * group.count + i) * BLOCK * PANEL);
          bool last = from + count == depth;
          if (last) fetch(block, group.first + i);
          add(block, from, count, desk, desk.panels + i * packed, sums);
          if (last) store(block, group.first + i, sums);
        }
    }
  }

  void add(int64_t block, int64_t from, int64_t count, const Desk& desk, const T* panel, float* sums) const {
    int64_t left = std::min(BLOCK, rows_ - block * BLOCK), depth = right_.depth;
    bool padded = left % BLOCK_STEP != 0;
    const T* rows = (padded ? desk.last_rows : a_ + block * BLOCK * depth) + from;
    for (int64_t at = 0; at < count; at += DEPTH)
      block_product(rounded_up(left, BLOCK_STEP), PANEL, std::min(DEPTH, count - at), {depth, PANEL}, from + at > 0, rows + at,
                    panel + at * PANEL, sums);
  }

  // Prefetches the place of a block's results, so that it is in cache when they are computed.
  void fetch(int64_t block, int64_t panel) const {
    int64_t row = block * BLOCK, column = panel * PANEL, value = sizeof(T);
    dyad_fetch(y_ + row * right_.columns + column, right_.columns * value, std::min(BLOCK, rows_ - row),
               std::min(PANEL, right_.columns - column) * value);
  }

  void store(int64_t block, int64_t panel, const float* sums) const {
    int64_t row = block * BLOCK, column = panel * PANEL;
    dyad_store(sums, PANEL, added_.from(row, column), y_ + row * right_.columns + column, right_.columns,
               std::min(BLOCK, rows_ - row), std::min(PANEL, right_.columns - column));
  }
};

}  // namespace dyad
