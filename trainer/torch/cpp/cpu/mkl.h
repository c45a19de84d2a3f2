// MKL's matrix products, which libtorch_cpu contains. `multiply` is column-major like MKL; `add_outer_product` is row-major.
#pragma once

#include "scalars.h"

extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha,
                       const float* a, const int* lda, const float* b, const int* ldb, const float* beta, float* c,
                       const int* ldc);
extern "C" void gemm_bf16bf16f32_(const char* transa, const char* transb, const int* m, const int* n, const int* k,
                                  const float* alpha, const uint16_t* a, const int* lda, const uint16_t* b, const int* ldb,
                                  const float* beta, float* c, const int* ldc);

namespace {

inline void multiply(const char* transa, const char* transb, int m, int n, int k, const float* a, int lda, const float* b, int ldb,
                     float beta, float* c, int ldc) {
  const float alpha = 1.0f;
  sgemm_(transa, transb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void multiply(const char* transa, const char* transb, int m, int n, int k, const Bf16* a, int lda, const Bf16* b, int ldb,
                     float beta, float* c, int ldc) {
  const float alpha = 1.0f;
  gemm_bf16bf16f32_(transa, transb, &m, &n, &k, &alpha, &a->bits, &lda, &b->bits, &ldb, &beta, c, &ldc);
}

// Row-major `sum[rows, columns] += a[terms, rows]ᵀ · b[terms, columns]`.
template <typename T>
void add_outer_product(int64_t terms, int64_t rows, int64_t columns, const T* a, const T* b, float* sum) {
  multiply("N", "T", columns, rows, terms, b, columns, a, rows, 1.0f, sum, columns);
}

}  // namespace
