// Element types of tensors, for loops that the compiler vectorises. Includes no libtorch header.
#pragma once

#include <cstdint>
#include <cstring>

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
// Rounds to nearest, ties to even; NaN stays NaN. Uses a mask for NaN, because compilers turn a conditional into a jump.
DYAD_INLINE void narrow(float value, Bf16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  uint32_t nan = -static_cast<uint32_t>(value != value);
  out.bits = static_cast<uint16_t>((rounded & ~nan) | (0x7fc0 & nan));
}
