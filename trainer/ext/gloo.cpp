// Gloo collectives of libtorch: c10d::ProcessGroupGloo over a c10d::TCPStore.
#include "bridge.h"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace {

class ClosableGloo : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;

  void close_connections() {
    for (auto& context : contexts_) context->closeConnections();
  }
};

// What every waiter of a group looks at. Closing Gloo's connections wakes the peers, but not this rank's own waiters.
struct Signal {
  std::mutex mutex;
  std::condition_variable changed;
  bool aborted = false;
};

// Over 5 ms one way, two ranks: 0.35 GB/s with one connection and four workers, 0.60 with these.
constexpr int CONNECTIONS = 2;
constexpr int WORKERS = 8;

using Store = c10::intrusive_ptr<c10d::Store>;

struct Group {
  c10::intrusive_ptr<ClosableGloo> gloo;
  std::shared_ptr<Signal> signal;
};

struct Work {
  c10::intrusive_ptr<c10d::Work> work;
  std::shared_ptr<Signal> signal;
};

// libtorch's flight recorder is one for the whole process and breaks when two groups enqueue at once (seen in 2.11.0).
std::mutex enqueueing;

// Starts a collective on a live group.
template <typename Start>
dyad_error started(void* group, void** work, Start&& start) {
  return guarded([&] {
    auto& live = *static_cast<Group*>(group);
    {
      std::lock_guard<std::mutex> lock(live.signal->mutex);
      if (live.signal->aborted) throw std::runtime_error("the communicator was aborted");
    }
    std::lock_guard<std::mutex> lock(enqueueing);
    *work = new Work{start(*live.gloo), live.signal};
  });
}

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
    // One connection to a peer reaches no more than its window allows in a round trip: collectives take turns on several.
    for (int connection = 0; connection < CONNECTIONS; ++connection)
      options->devices.push_back(*interface_host ? c10d::ProcessGroupGloo::createDeviceForHostname(interface_host)
                                                 : c10d::ProcessGroupGloo::createDefaultDevice());
    // Each worker thread has one all-reduce in flight: several hide the link's delay, which each alone would wait out. They
    // sleep while they wait, so compute keeps the cores; every rank takes them up in the order they are issued.
    options->threads = WORKERS;
    auto scoped = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<Store*>(store));
    auto gloo = c10::make_intrusive<ClosableGloo>(scoped, rank, world_size, options);
    *group = new Group{std::move(gloo), std::make_shared<Signal>()};
  });
}

// Collectives in flight fail, here at once and on the peers as soon as they see the connection close. From any thread.
dyad_error dyad_gloo_abort(void* group) {
  return guarded([&] {
    auto& live = *static_cast<Group*>(group);
    {
      std::lock_guard<std::mutex> lock(live.signal->mutex);
      live.signal->aborted = true;
    }
    live.signal->changed.notify_all();
    live.gloo->close_connections();
  });
}

void dyad_gloo_free(void* group) {
  auto* live = static_cast<Group*>(group);
  // The worker of an aborted group may wait for a peer that never comes, and the destructor would wait for the worker.
  if (live->signal->aborted) static_cast<void>(live->gloo.release());
  delete live;
}

// Each collective starts in the background and hands back a work to wait for.
dyad_error dyad_gloo_all_reduce(void* group, at::Tensor* tensor, void** work) {
  return started(group, work, [&](ClosableGloo& gloo) {
    std::vector<at::Tensor> tensors{*tensor};
    return gloo.allreduce(tensors);
  });
}

// Values [from, from + count) of every rank's input, to their places in the concatenation. Gloo gathers into a copy of what it
// is asked for, which is why a caller asks for pieces.
dyad_error dyad_gloo_all_gather(void* group, at::Tensor* output, at::Tensor* input, int64_t from, int64_t count,
                                void** work) {
  return started(group, work, [&](ClosableGloo& gloo) {
    std::vector<at::Tensor> inputs{input->narrow(0, from, count)};
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int64_t rank = 0; rank < gloo.getSize(); ++rank)
      outputs[0].push_back(output->narrow(0, rank * input->size(0) + from, count));
    return gloo.allgather(outputs, inputs);
  });
}

dyad_error dyad_gloo_broadcast(void* group, at::Tensor* tensor, int root, void** work) {
  return started(group, work, [&](ClosableGloo& gloo) {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    return gloo.broadcast(tensors, options);
  });
}

dyad_error dyad_gloo_barrier(void* group, void** work) {
  return started(group, work, [&](ClosableGloo& gloo) { return gloo.barrier(); });
}

// Returns when the collective is done; fails when it failed or its group was aborted.
dyad_error dyad_work_wait(void* work) {
  return guarded([&] {
    auto& pending = *static_cast<Work*>(work);
    auto signal = pending.signal;
    auto done = std::make_shared<bool>(false);
    pending.work->getFuture()->addCallback([signal, done](c10::ivalue::Future&) {
      {
        std::lock_guard<std::mutex> lock(signal->mutex);
        *done = true;
      }
      signal->changed.notify_all();
    });
    {
      std::unique_lock<std::mutex> lock(signal->mutex);
      signal->changed.wait(lock, [&] { return *done || signal->aborted; });
      if (!*done) throw std::runtime_error("the communicator was aborted");
    }
    pending.work->wait();
  });
}

void dyad_work_free(void* work) { delete static_cast<Work*>(work); }

}  // extern "C"
