// Access to tensors as arrays.
#pragma once

#include <ATen/core/Tensor.h>

#include "scalars.h"

// Calls the body with a null pointer to the tensor's element type: float for float32, otherwise Bf16.
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
