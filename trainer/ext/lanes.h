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
// Round to nearest, ties to even; a NaN stays one.
DYAD_INLINE void narrow(float value, Bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// What is left of a value once it was stored as a T.
template <typename T>
DYAD_INLINE float rounded(float value) {
  T stored;
  narrow(value, stored);
  return widen(stored);
}

// e^x to about one unit in the last place, by Cephes' polynomial; x is clamped to where the result is finite and normal.
DYAD_INLINE float exponential(float x) {
  x = x < 88.3f ? x : 88.3f;
  x = x > -87.3f ? x : -87.3f;
  float scaled = x * 1.44269504088896341f;
  int32_t n = static_cast<int32_t>(scaled + (scaled < 0.0f ? -0.5f : 0.5f));
  float r = x - static_cast<float>(n) * 0.693359375f + static_cast<float>(n) * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

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
