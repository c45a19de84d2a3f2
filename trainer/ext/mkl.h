// MKL's products, inside libtorch_cpu; column-major there, row-major here.
#pragma once

#include "lanes.h"

extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                       const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                       const int* ldc);
extern "C" void gemm_bf16bf16f32_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                                  const float* alpha, const uint16_t* a, const int* lda, const uint16_t* b, const int* ldb,
                                  const float* beta, float* c, const int* ldc);

namespace {

inline void multiply(const char* transa, const char* transb, int m, int n, int k, float alpha, const float* a, int lda,
                     const float* b, int ldb, float beta, float* c, int ldc) {
  sgemm_(transa, transb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void multiply(const char* transa, const char* transb, int m, int n, int k, float alpha, const Bf16* a, int lda,
                     const Bf16* b, int ldb, float beta, float* c, int ldc) {
  gemm_bf16bf16f32_(transa, transb, &m, &n, &k, &alpha, &a->bits, &lda, &b->bits, &ldb, &beta, c, &ldc);
}

// Row-major `c[k, n] += alpha · a[m, k]ᵀ · b[m, n]`, the rows of a `stride` apart.
template <typename E>
void add_transposed_times(int64_t m, int64_t n, int64_t k, float alpha, const E* a, int64_t stride, const E* b, float* c) {
  multiply("N", "T", n, k, m, alpha, b, n, a, stride, 1.0f, c, n);
}

}  // namespace
