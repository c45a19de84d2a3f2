// Calls the kernels of kernels.cu, with their derivatives, on libtorch's current stream. Rust passes the kernels as handles of the
// driver, so that nothing here links CUDA.
#include "bridge.h"
#include "gpu.h"

#include <array>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::Variable;
using torch::autograd::variable_list;

namespace {

// The signature of cuLaunchKernel.
using Launch = int (*)(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra);

enum Kernel { kSwiglu, kSwigluBackward, kRotate, kHead, kFold, kKernels };

Launch launch = nullptr;
std::array<void*, kKernels> kernels{};

constexpr unsigned kThreads = 256, kHeadThreads = 1024;
constexpr int64_t kVector = 8;

void* stream_of(c10::Device device) {
  c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return guard.getStreamNativeHandle(guard.getStream(device));
}

template <typename... Arguments>
void run(Kernel kernel, int64_t blocks, unsigned threads, c10::Device device, Arguments... arguments) {
  if (blocks == 0) return;
  void* stream = device.is_cuda() ? stream_of(device) : nullptr;
  void* pointers[] = {&arguments...};
  int status = launch(kernels[kernel], static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, 0, stream, pointers, nullptr);
  TORCH_CHECK(status == 0, "cuLaunchKernel: status ", status);
}

// Launches one thread for each of `count` pieces of work.
template <typename... Arguments>
void spread(Kernel kernel, int64_t count, c10::Device device, Arguments... arguments) {
  run(kernel, (count + kThreads - 1) / kThreads, kThreads, device, arguments...);
}

void* memory(const at::Tensor& tensor) { return tensor.data_ptr(); }

std::vector<c10::IValue> seen(std::initializer_list<at::Tensor> tensors) {
  return std::vector<c10::IValue>(tensors.begin(), tensors.end());
}

struct Swiglu : public Function<Swiglu> {
  static Variable forward(AutogradContext* context, const Variable& gate, const Variable& up) {
    RECORD_FUNCTION("dyad::swiglu", seen({gate, up}));
    auto g = gate.contiguous(), u = up.contiguous(), y = at::empty_like(g);
    auto eights = static_cast<long long>(g.numel() / kVector);
    spread(kSwiglu, eights, g.device(), memory(g), memory(u), memory(y), eights);
    context->save_for_backward({g, u});
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    auto dy = gradients[0].contiguous();
    const auto &gate = saved[0], &up = saved[1];
    RECORD_FUNCTION("dyad::swiglu_backward", seen({dy, gate, up}));
    auto dgate = at::empty_like(gate), dup = at::empty_like(up);
    auto eights = static_cast<long long>(dy.numel() / kVector);
    spread(kSwigluBackward, eights, dy.device(), memory(dy), memory(gate), memory(up), memory(dgate), memory(dup), eights);
    return {dgate, dup};
  }
};

struct Rotate : public Function<Rotate> {
  static at::Tensor turned(const at::Tensor& any, const at::Tensor& cosines, const at::Tensor& sines, float sign) {
    RECORD_FUNCTION("dyad::rotate", seen({any}));
    auto x = any.contiguous(), y = at::empty_like(x);
    auto count = static_cast<long long>(x.numel() / (2 * kVector));
    spread(kRotate, count, x.device(), memory(x), memory(cosines), memory(sines), memory(y), count,
           static_cast<int>(x.size(1)), static_cast<int>(x.size(2) / (2 * kVector)), sign);
    return y;
  }

  static Variable forward(AutogradContext* context, const Variable& x, const Variable& cosines, const Variable& sines) {
    context->save_for_backward({cosines, sines});
    return turned(x, cosines, sines, 1.0f);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    auto saved = context->get_saved_variables();
    return {turned(gradients[0], saved[0], saved[1], -1.0f), Variable(), Variable()};
  }
};

}  // namespace

namespace dyad {

bool folds(const at::Tensor& gradient) {
  return launch != nullptr && gradient.scalar_type() == at::kBFloat16 && gradient.size(2) % kVector == 0;
}

at::Tensor fold(const at::Tensor& copies, const at::Tensor& starts, const at::Tensor& places, int64_t rows) {
  RECORD_FUNCTION("dyad::fold", seen({copies}));
  auto x = copies.contiguous(), y = at::empty({rows, x.size(1), x.size(2)}, x.options());
  auto count = static_cast<long long>(y.numel() / kVector);
  spread(kFold, count, x.device(), memory(x), memory(starts), memory(places), memory(y), count,
         static_cast<int>(x.size(1) * x.size(2) / kVector));
  return y;
}

void head_score(const at::Tensor& policy, const at::Tensor* reference, const at::Tensor& targets, const at::Tensor& logps,
                const at::Tensor* reference_logps, const at::Tensor* facts, bool keep) {
  auto optional = [](const at::Tensor* tensor) -> void* { return tensor == nullptr ? nullptr : memory(*tensor); };
  run(kHead, policy.size(0), kHeadThreads, policy.device(), memory(policy), optional(reference), memory(targets),
      memory(logps), optional(reference_logps), optional(facts), static_cast<int>(policy.size(1) / kVector),
      static_cast<int>(keep));
}

}  // namespace dyad

extern "C" {

// Sets the kernels, as handles in the order of `Kernel`, and the driver's launch function.
void dyad_gpu_kernels(void* launcher, void* const* handles) {
  launch = reinterpret_cast<Launch>(launcher);
  std::copy_n(handles, kernels.size(), kernels.begin());
}

// Whether the kernels are set.
bool dyad_gpu_kernels_ready() { return launch != nullptr; }

// Returns `silu(gate) * up` as a new tensor. Here and below tensors are bfloat16 on the GPU; the last axis is a multiple of 8,
// for a rotation of 16.
dyad_error dyad_gpu_swiglu(at::Tensor* gate, at::Tensor* up, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(Swiglu::apply(*gate, *up)); });
}

// Rotates `[tokens, heads, width]` by contiguous angles `[tokens, 1, width]`. The first half of each row of sines is negated.
dyad_error dyad_gpu_rotate(at::Tensor* x, at::Tensor* cosines, at::Tensor* sines, at::Tensor** y) {
  return guarded([&] { *y = new at::Tensor(Rotate::apply(*x, *cosines, *sines)); });
}

}  // extern "C"
