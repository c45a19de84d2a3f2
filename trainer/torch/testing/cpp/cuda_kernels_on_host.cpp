// For tests only: kernels.cu compiled for the host, behind a launcher with the driver's signature. If the threads of a block wait for
// each other, each is a host thread. Tests check with it how the kernels are called and what they compute, but not that a GPU
// runs them.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include <c10/util/BFloat16.h>

namespace {

struct Index {
  unsigned x;
};

thread_local Index threadIdx;
Index blockIdx, blockDim;

float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float __int_as_float(unsigned bits) { return __uint_as_float(bits); }
float host_exp(float x) { return std::exp(x); }

unsigned narrowed(float one, float two) {
  return c10::BFloat16(one).x | static_cast<unsigned>(c10::BFloat16(two).x) << 16;
}

// Threads of a block that wait for each other: two warps, fewer than on a GPU. One block runs at a time.
constexpr unsigned kBlock = 64;
std::barrier<>& everybody() {
  static std::barrier<> barrier(kBlock);
  return barrier;
}
float exchanged[kBlock];

void __syncthreads() { everybody().arrive_and_wait(); }

// Waits for the whole block instead of the warp, which is valid because all threads of a block take the same path.
float __shfl_xor_sync(unsigned, float own, int step) {
  exchanged[threadIdx.x] = own;
  everybody().arrive_and_wait();
  float other = exchanged[threadIdx.x ^ step];
  everybody().arrive_and_wait();
  return other;
}

}  // namespace

#define __expf host_exp
#define __global__
#define __device__ static
#define __shared__ static
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(threads)
#define asm(...) pair = narrowed(one, two)
#include "kernels.cu"
#undef asm

namespace {

using Body = void (*)(void** arguments);

template <typename T>
T get(void** arguments, int index) {
  return *static_cast<T*>(arguments[index]);
}

template <typename... Parameters, size_t... Indices>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Indices...>) {
  kernel(get<Parameters>(arguments, Indices)...);
}

template <auto kernel, typename... Parameters>
void invoke(void (*)(Parameters...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

template <auto kernel>
void body(void** arguments) {
  invoke<kernel>(kernel, arguments);
}

void* handle(Body body) { return reinterpret_cast<void*>(body); }

int launch_here(void* kernel, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned, void*,
                void** arguments, void**) {
  // Tests run in parallel, but the kernels share global variables.
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  auto run = reinterpret_cast<Body>(kernel);
  bool meet = threads == kThreads;
  blockDim = {meet ? kBlock : threads};
  for (blockIdx = {0}; blockIdx.x < blocks; ++blockIdx.x) {
    if (!meet) {
      for (threadIdx = {0}; threadIdx.x < threads; ++threadIdx.x) run(arguments);
      continue;
    }
    std::vector<std::thread> lanes;
    for (unsigned lane = 0; lane < kBlock; ++lane)
      lanes.emplace_back([&, lane] {
        threadIdx = {lane};
        run(arguments);
      });
    for (auto& lane : lanes) lane.join();
  }
  return 0;
}

}  // namespace

extern "C" {

void dyad_gpu_kernels(void* launcher, void* const* handles);

// Registers the kernels for the rest of the process.
void dyad_host_kernels() {
  void* handles[] = {handle(body<gpu_swiglu>), handle(body<gpu_swiglu_backward>), handle(body<gpu_rotate>),
                     handle(body<gpu_head>), handle(body<gpu_fold>)};
  dyad_gpu_kernels(reinterpret_cast<void*>(launch_here), handles);
}

}  // extern "C"
