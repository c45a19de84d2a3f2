// Device facts that tch does not expose, through c10's device-generic interfaces, so that nothing here links CUDA.
#include "bridge.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

extern "C" {

// The driver's handle for libtorch's current stream on a CUDA device; null means the device's default stream.
dyad_error dyad_cuda_current_stream(int device, void** stream) {
  return guarded([&] {
    c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    auto current = guard.getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)));
    *stream = guard.getStreamNativeHandle(current);
  });
}

// A copy of a host tensor in pinned memory, which the device reads directly.
dyad_error dyad_pinned(at::Tensor* host, at::Tensor** pinned) {
  return guarded([&] { *pinned = new at::Tensor(host->pin_memory()); });
}

// Free bytes of a CUDA device, plus the bytes that libtorch has cached but does not use.
dyad_error dyad_cuda_free_bytes(int device, int64_t* bytes) {
  return guarded([&] {
    auto index = static_cast<c10::DeviceIndex>(device);
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    constexpr auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    auto stats = allocator->getDeviceStats(index);
    *bytes = static_cast<int64_t>(allocator->getMemoryInfo(index).first) + stats.reserved_bytes[all].current -
             stats.allocated_bytes[all].current;
  });
}

// Peak bytes that libtorch's caching allocator has allocated for tensors on a CUDA device.
dyad_error dyad_cuda_peak_bytes(int device, int64_t* bytes) {
  return guarded([&] {
    auto stats = c10::getDeviceAllocator(c10::DeviceType::CUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  });
}

}  // extern "C"
