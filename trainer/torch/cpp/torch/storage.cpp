// Releases and reallocates the memory of a tensor while autograd and the model keep its views.
#include "bridge.h"

#include <map>
#include <mutex>
#include <utility>

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StorageImpl.h>

namespace {

// Released host memory, kept for reuse. Units of a model have similar sizes, so a few blocks serve all of them; malloc would
// fragment the heap. libtorch's allocators for other devices cache memory themselves.
class Pool {
 public:
  void put(size_t bytes, at::DataPtr block) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.emplace(bytes, std::move(block));
  }

  // The smallest block that is large enough, and its size; size 0 if there is none.
  std::pair<size_t, at::DataPtr> take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.lower_bound(bytes);
    if (found == blocks_.end()) return {0, at::DataPtr()};
    // Of equal blocks take the last one put back: its pages were used most recently, and the oldest may never be needed.
    found = std::prev(blocks_.upper_bound(found->first));
    std::pair<size_t, at::DataPtr> block(found->first, std::move(found->second));
    blocks_.erase(found);
    return block;
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, at::DataPtr> blocks_;
};

Pool& pool() {
  // Never destroyed: tensors may outlive static objects at exit.
  static auto* pool = new Pool;
  return *pool;
}

}  // namespace

extern "C" {

// Makes a tensor `[length]` without memory, with the options of `like`.
dyad_error dyad_storage_bare(at::Tensor* like, int64_t length, at::Tensor** tensor) {
  return guarded([&] {
    auto bare = at::empty({0}, like->options());
    bare.unsafeGetTensorImpl()->set_sizes_contiguous({length});
    *tensor = new at::Tensor(std::move(bare));
  });
}

// Frees the memory behind a tensor and all its views; their shapes stay.
dyad_error dyad_storage_release(at::Tensor* tensor) {
  return guarded([&] {
    auto* storage = tensor->storage().unsafeGetStorageImpl();
    auto bytes = storage->nbytes();
    auto block = storage->set_data_ptr(at::DataPtr(nullptr, storage->device()));
    storage->set_nbytes(0);
    if (storage->device().is_cpu() && bytes > 0) pool().put(bytes, std::move(block));
  });
}

// Allocates memory again for a tensor that covers its whole storage; the contents are undefined.
dyad_error dyad_storage_allocate(at::Tensor* tensor) {
  return guarded([&] {
    c10::OptionalDeviceGuard guard(tensor->device());
    auto* storage = tensor->storage().unsafeGetStorageImpl();
    auto bytes = static_cast<size_t>(tensor->numel()) * tensor->element_size();
    std::pair<size_t, at::DataPtr> block;
    if (storage->device().is_cpu()) block = pool().take(bytes);
    if (block.first == 0) block = {bytes, storage->allocator()->allocate(bytes)};
    storage->set_data_ptr_noswap(std::move(block.second));
    storage->set_nbytes(block.first);
  });
}

}  // extern "C"
