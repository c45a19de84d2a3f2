// Where a backward pass adds the gradients of weights, instead of handing them out.
#pragma once

#include <unordered_map>

#include <ATen/core/Tensor.h>

namespace dyad {

// Names float32 gradients for the backward pass that this thread runs while this lives. On the CPU a backward pass runs on the
// thread that asks for it.
class Sinks {
 public:
  Sinks() { current() = this; }
  ~Sinks() { current() = nullptr; }
  Sinks(const Sinks&) = delete;
  Sinks& operator=(const Sinks&) = delete;

  void add(const at::Tensor& weight, const at::Tensor& gradient) { gradients_.emplace(weight.data_ptr(), gradient); }

  // Null where the gradient is to be handed out.
  static const at::Tensor* of(const at::Tensor& weight) {
    if (current() == nullptr) return nullptr;
    auto found = current()->gradients_.find(weight.data_ptr());
    return found == current()->gradients_.end() ? nullptr : &found->second;
  }

 private:
  std::unordered_map<const void*, at::Tensor> gradients_;

  static Sinks*& current() {
    thread_local Sinks* sinks = nullptr;
    return sinks;
  }
};

}  // namespace dyad
