// Gloo collectives of libtorch: c10d::ProcessGroupGloo over a c10d::TCPStore.
#include "bridge.h"

#include <chrono>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace {

// Adds what the base class lacks: an abort that wakes every waiter.
class AbortableGloo : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;

  void close_connections() {
    for (auto& context : contexts_) context->closeConnections();
  }
};

using Store = c10::intrusive_ptr<c10d::Store>;
using Group = c10::intrusive_ptr<AbortableGloo>;
using Work = c10::intrusive_ptr<c10d::Work>;

}  // namespace

extern "C" {

// Serves (is_server) or joins the key-value store at host:*port; a server given port 0 writes back the one it got.
dyad_error dyad_store_new(const char* host, uint16_t* port, bool is_server, int64_t timeout_ms, void** store) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = *port;
    options.isServer = is_server;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    *port = tcp->getPort();
    *store = new Store(std::move(tcp));
  });
}

void dyad_store_free(void* store) { delete static_cast<Store*>(store); }

// Connects this rank to all others; blocks until they are there. `interface_host` is the address to listen on.
dyad_error dyad_gloo_new(void* store, const char* prefix, const char* interface_host, int rank, int world_size,
                         int64_t timeout_ms, void** group) {
  return guarded([&] {
    auto timeout = std::chrono::milliseconds(timeout_ms);
    auto options = c10d::ProcessGroupGloo::Options::create(timeout);
    options->devices.push_back(*interface_host ? c10d::ProcessGroupGloo::createDeviceForHostname(interface_host)
                                               : c10d::ProcessGroupGloo::createDefaultDevice());
    // One worker thread: collectives run in the order they are issued, and compute keeps the cores.
    options->threads = 1;
    auto scoped = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<Store*>(store));
    *group = new Group(c10::make_intrusive<AbortableGloo>(scoped, rank, world_size, options));
  });
}

// Closes every connection: collectives in flight fail on all ranks. Callable from any thread.
dyad_error dyad_gloo_abort(void* group) {
  return guarded([&] { (*static_cast<Group*>(group))->close_connections(); });
}

void dyad_gloo_free(void* group) { delete static_cast<Group*>(group); }

// Each collective starts in the background and hands back a work to wait for.
dyad_error dyad_gloo_all_reduce(void* group, at::Tensor* tensor, void** work) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    *work = new Work((*static_cast<Group*>(group))->allreduce(tensors));
  });
}

dyad_error dyad_gloo_reduce_scatter(void* group, at::Tensor* output, at::Tensor* input, void** work) {
  return guarded([&] {
    *work = new Work((*static_cast<Group*>(group))->_reduce_scatter_base(*output, *input));
  });
}

dyad_error dyad_gloo_all_gather(void* group, at::Tensor* output, at::Tensor* input, void** work) {
  return guarded([&] { *work = new Work((*static_cast<Group*>(group))->_allgather_base(*output, *input)); });
}

dyad_error dyad_gloo_broadcast(void* group, at::Tensor* tensor, int root, void** work) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *work = new Work((*static_cast<Group*>(group))->broadcast(tensors, options));
  });
}

dyad_error dyad_gloo_barrier(void* group, void** work) {
  return guarded([&] { *work = new Work((*static_cast<Group*>(group))->barrier()); });
}

dyad_error dyad_work_wait(void* work) {
  return guarded([&] { (*static_cast<Work*>(work))->wait(); });
}

void dyad_work_free(void* work) { delete static_cast<Work*>(work); }

}  // extern "C"
