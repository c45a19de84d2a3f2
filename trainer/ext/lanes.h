// What the fused CPU kernels are written with: scalars in loops that the compiler turns into vector code, and tensors as
// arrays of them.
#pragma once

#include <cstdint>
#include <cstring>

#include <ATen/core/Tensor.h>

// One copy of a function per instruction set; the loader picks the best one that the CPU has.
#if __GNUC__ >= 12
#define DYAD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DYAD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#define DYAD_INLINE static inline __attribute__((always_inline))

// Storage of a bfloat16.
struct Bf16 {
  uint16_t bits;
};

DYAD_INLINE float widen(float value) { return value; }
DYAD_INLINE float widen(Bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

DYAD_INLINE void narrow(float value, float& out) { out = value; }
// Round to nearest, ties to even; a NaN stays one, by a mask: of a choice compilers make jumps.
DYAD_INLINE void narrow(float value, Bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t nan = -static_cast<uint32_t>(value != value);
  out.bits = static_cast<uint16_t>((rounded & ~nan) | (0x7fc0 & nan));
}

// What is left of a value once it was stored as a T.
template <typename T>
DYAD_INLINE float rounded(float value) {
  T stored;
  narrow(value, stored);
  return widen(stored);
}

DYAD_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
DYAD_INLINE float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// x between -87.3 and 88.3, where e^x is finite and normal. By whole numbers, whose order is that of positive numbers and the
// reverse of that of negative ones: of comparisons of floats compilers make paths for what lies outside.
DYAD_INLINE float clamped(float x) {
  uint32_t bits = bits_of(x), lowest = bits_of(-87.3f);
  int32_t above = static_cast<int32_t>(bits < lowest ? bits : lowest), highest = static_cast<int32_t>(bits_of(88.3f));
  return of_bits(static_cast<uint32_t>(above < highest ? above : highest));
}

// e^x to about one unit in the last place, by Cephes' polynomial; x is clamped. Adding 1.5 · 2^23 rounds to a whole number, which
// then is in the lowest bits.
DYAD_INLINE float exponential(float x) {
  constexpr float whole = 12582912.0f;
  x = clamped(x);
  float shifted = x * 1.44269504088896341f + whole, n = shifted - whole;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * of_bits((bits_of(shifted) + 127) << 23);
}

// The same, but what is no number stays none: clamping makes one of it.
DYAD_INLINE float exponential_or_none(float x) { return exponential(x) + (x - x); }

DYAD_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Calls the body with a null pointer of the tensor's storage type: float32, or else bfloat16.
template <typename Body>
void by_kind(const at::Tensor& tensor, Body&& body) {
  if (tensor.scalar_type() == at::kFloat)
    body(static_cast<float*>(nullptr));
  else
    body(static_cast<Bf16*>(nullptr));
}

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
