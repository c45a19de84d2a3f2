// Error convention of the bridge, a C interface to libtorch functions that tch 0.24 lacks. Every function that can fail returns
// null on success, or a malloc'ed message that the caller frees with free(). Tensors are `at::Tensor*`, borrowed unless stated
// otherwise.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include <ATen/core/Tensor.h>

using dyad_error = char*;

template <typename Body>
dyad_error guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}
