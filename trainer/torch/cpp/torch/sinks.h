// Sinks: tensors to which a backward pass adds the gradients of weights instead of returning them.
#pragma once

#include <atomic>
#include <unordered_map>

#include <ATen/core/Tensor.h>

namespace dyad {

// Registers float32 sinks for the backward pass that this thread runs while the object lives. On the CPU a backward pass runs on
// the calling thread; on a GPU it runs on a thread of autograd, which runs one such pass at a time.
class Sinks {
 public:
  Sinks() { current() = this; }
  ~Sinks() {
    current() = nullptr;
    const Sinks* self = this;
    on_device().compare_exchange_strong(self, nullptr);
  }
  Sinks(const Sinks&) = delete;
  Sinks& operator=(const Sinks&) = delete;

  void add(const at::Tensor& weight, const at::Tensor& gradient) {
    gradients_.emplace(weight.data_ptr(), gradient);
    if (weight.is_cuda()) on_device() = this;
  }

  // The sink of a weight; null if its gradient must be returned.
  static const at::Tensor* of(const at::Tensor& weight) {
    const Sinks* sinks = weight.is_cuda() ? on_device().load() : current();
    if (sinks == nullptr) return nullptr;
    auto found = sinks->gradients_.find(weight.data_ptr());
    return found == sinks->gradients_.end() ? nullptr : &found->second;
  }

 private:
  std::unordered_map<const void*, at::Tensor> gradients_;

  static Sinks*& current() {
    thread_local Sinks* sinks = nullptr;
    return sinks;
  }

  static std::atomic<const Sinks*>& on_device() {
    static std::atomic<const Sinks*> sinks = nullptr;
    return sinks;
  }
};

}  // namespace dyad
