// AdamW with 8-bit moments, block by block, on the CPU.
#include "bridge.h"
#include "tensors.h"

#include <cmath>

#include <ATen/Parallel.h>

namespace {

constexpr int64_t kBlock = 256;

struct Moment {
  uint8_t* codes;
  float* absmax;
  const float* fractions;
  // 256 midpoints between neighbouring fractions; the last is infinite.
  const float* middles;
  // Code of the lowest value of each cell; a cell contains at most one midpoint.
  const int32_t* starts;
};

// A cell is the set of values with the same sign, exponent (at least -25) and first eight bits of the mantissa. Smaller magnitudes
// share the first cell of their sign.
constexpr int32_t kCells = (25 << 8) + 1;

DYAD_INLINE int32_t cell(float fraction) {
  uint32_t bits;
  std::memcpy(&bits, &fraction, sizeof bits);
  int32_t magnitude = static_cast<int32_t>((bits & 0x7fffffff) >> 15) - (102 << 8);
  magnitude = magnitude < 0 ? 0 : magnitude;
  magnitude = magnitude > kCells - 1 ? kCells - 1 : magnitude;
  return magnitude + (bits >> 31 ? kCells : 0);
}

struct Step {
  float decay, beta1, beta2, step_size, root_correction, eps;
};

DYAD_INLINE void read(const Moment& moment, int64_t block, float* values) {
  const uint8_t* codes = moment.codes + block * kBlock;
  float scale = moment.absmax[block];
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) values[i] = moment.fractions[codes[i]] * scale;
}

// The code of a fraction is the number of midpoints below it.
DYAD_INLINE void write(const Moment& moment, int64_t block, const float* values, bool keeps_positive) {
  float absmax = 0.0f;
#pragma omp simd reduction(max : absmax)
  for (int64_t i = 0; i < kBlock; ++i) {
    float magnitude = std::fabs(values[i]);
    absmax = absmax > magnitude ? absmax : magnitude;
  }
  float divisor = std::max(absmax, 1.17549435e-38f);
  uint8_t* codes = moment.codes + block * kBlock;
#pragma omp simd
  for (int64_t i = 0; i < kBlock; ++i) {
    float fraction = values[i] / divisor;
    int32_t start = moment.starts[cell(fraction)];
    int32_t code = start + (moment.middles[start] < fraction ? 1 : 0);
    int32_t least = keeps_positive && values[i] > 0.0f ? 1 : 0;
    codes[i] = static_cast<uint8_t>(code > least ? code : least);
  }
  moment.absmax[block] = absmax;
}

DYAD_CLONES void update(float* parameter, const float* gradient, const Moment& first, const Moment& second, Step step,
                        int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    float mean[kBlock], square[kBlock];
    read(first, block, mean);
    read(second, block, square);
    float* p = parameter + block * kBlock;
    const float* g = gradient + block * kBlock;
#pragma omp simd
    for (int64_t i = 0; i < kBlock; ++i) {
      mean[i] += (g[i] - mean[i]) * (1.0f - step.beta1);
      square[i] = square[i] * step.beta2 + g[i] * g[i] * (1.0f - step.beta2);
      float denominator = std::sqrt(square[i]) / step.root_correction + step.eps;
      p[i] = p[i] * step.decay - step.step_size * mean[i] / denominator;
    }
    write(first, block, mean, false);
    write(second, block, square, true);
  }
}

}  // namespace

extern "C" {

// One AdamW step. `moments` holds codes, absmax, fractions, middles and starts of the first moment, then of the second.
// `hyper` holds learning rate, beta1, beta2, weight decay, eps, and the number of the step, counted from 1.
dyad_error dyad_adamw_8bit(at::Tensor* parameter, at::Tensor* gradient, at::Tensor* const* moments,
                           const double* hyper) {
  return guarded([&] {
    auto moment = [&](size_t at) {
      return Moment{data<uint8_t>(*moments[at]), data<float>(*moments[at + 1]), data<float>(*moments[at + 2]),
                    data<float>(*moments[at + 3]), data<int32_t>(*moments[at + 4])};
    };
    Moment first = moment(0), second = moment(5);
    double correction1 = 1.0 - std::pow(hyper[1], hyper[5]), correction2 = 1.0 - std::pow(hyper[2], hyper[5]);
    Step step{static_cast<float>(1.0 - hyper[0] * hyper[3]), static_cast<float>(hyper[1]),
              static_cast<float>(hyper[2]),                  static_cast<float>(hyper[0] / correction1),
              static_cast<float>(std::sqrt(correction2)),    static_cast<float>(hyper[4])};
    auto* p = data<float>(*parameter);
    auto* g = data<float>(*gradient);
    at::parallel_for(0, parameter->numel() / kBlock, 64, [&](int64_t begin, int64_t end) {
      update(p, g, first, second, step, begin, end);
    });
  });
}

}  // extern "C"
