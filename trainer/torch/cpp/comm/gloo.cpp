// Collectives by libtorch's c10d::ProcessGroupGloo. A board of the caller serves as its store.
#include "bridge.h"

#include <dirent.h>
#include <linux/filter.h>
#include <sys/socket.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

namespace {

class ClosableGloo : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;

  void close_connections() {
    for (auto& context : contexts_) context->closeConnections();
  }
};

// Wakes all waiters of a group. Closing Gloo's connections wakes the peers, but not this rank's own waiters.
struct Signal {
  std::mutex mutex;
  std::condition_variable changed;
  bool aborted = false;
};

// Two ranks with a one-way delay of 5 ms: 0.35 GB/s with one connection and four workers, 0.60 GB/s with these numbers.
constexpr int CONNECTIONS = 2;
constexpr int WORKERS = 8;

using Store = c10::intrusive_ptr<c10d::Store>;

using Bytes = dyad_bytes;

Bytes bytes(const std::string& text) { return {reinterpret_cast<const uint8_t*>(text.data()), text.size()}; }

using Board = dyad_board;

// A board as a store. Gloo's rendezvous only sets keys and waits for keys of other ranks. The store opens no port.
class BoardStore : public c10d::Store {
 public:
  BoardStore(std::shared_ptr<Board> board, std::chrono::milliseconds timeout)
      : c10d::Store(timeout), board_(std::move(board)) {}

  c10::intrusive_ptr<c10d::Store> clone() override { return c10::make_intrusive<BoardStore>(board_, timeout_); }

  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    board_->post(board_->board, bytes(key), {value.data(), value.size()});
  }

  std::vector<uint8_t> get(const std::string& key) override {
    std::vector<uint8_t> value;
    if (!read(key, timeout_, value)) throw std::runtime_error("timed out waiting for a rank's address (" + key + ")");
    return value;
  }

  bool check(const std::vector<std::string>& keys) override {
    std::vector<uint8_t> value;
    for (auto& key : keys)
      if (!read(key, std::chrono::milliseconds(0), value)) return false;
    return true;
  }

  void wait(const std::vector<std::string>& keys) override { wait(keys, timeout_); }

  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) override {
    std::vector<uint8_t> value;
    for (auto& key : keys)
      if (!read(key, timeout, value)) throw std::runtime_error("timed out waiting for a rank's address (" + key + ")");
  }

  int64_t add(const std::string&, int64_t) override { throw std::runtime_error("the board has no counters"); }
  bool deleteKey(const std::string&) override { return false; }
  int64_t getNumKeys() override { throw std::runtime_error("the board does not count keys"); }

 private:
  bool read(const std::string& key, std::chrono::milliseconds patience, std::vector<uint8_t>& value) {
    auto deliver = [](void* to, Bytes read) {
      static_cast<std::vector<uint8_t>*>(to)->assign(read.data, read.data + read.len);
    };
    return board_->read(board_->board, bytes(key), patience.count(), &value, deliver);
  }

  std::shared_ptr<Board> board_;
};

// Descriptors of this process's listening sockets.
std::set<int> listeners() {
  std::set<int> found;
  DIR* folder = opendir("/proc/self/fd");
  if (!folder) throw std::runtime_error("cannot look at /proc/self/fd");
  while (auto* entry = readdir(folder)) {
    int listens = 0, descriptor = atoi(entry->d_name);
    socklen_t size = sizeof listens;
    if (getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) == 0 && listens) found.insert(descriptor);
  }
  closedir(folder);
  return found;
}

// Makes a listener drop all packets, by a socket filter: Gloo keeps its listeners open for its whole life and accepts every
// connection. Returns false if the kernel has no socket filters, as in some sandboxes.
bool deafen(int listener) {
  sock_filter nothing = {BPF_RET | BPF_K, 0, 0, 0};
  sock_fprog program = {1, &nothing};
  return setsockopt(listener, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0;
}

// A group finds its listeners by comparing the descriptors before and after, so only one group may open listeners at a time.
std::mutex opening;

struct Group {
  c10::intrusive_ptr<ClosableGloo> gloo;
  std::shared_ptr<Signal> signal;
};

struct Work {
  c10::intrusive_ptr<c10d::Work> work;
  std::shared_ptr<Signal> signal;
};

// libtorch's flight recorder is shared by the whole process and breaks when two groups enqueue at once (seen in 2.11.0).
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

// Makes a store from a board; the board is freed with the store.
dyad_error dyad_store_new(const Board* calls, int64_t timeout_ms, void** store) {
  return guarded([&] {
    std::shared_ptr<Board> board(new Board(*calls), [](Board* board) {
      board->free(board->board);
      delete board;
    });
    *store = new Store(c10::make_intrusive<BoardStore>(std::move(board), std::chrono::milliseconds(timeout_ms)));
  });
}

void dyad_store_free(void* store) { delete static_cast<Store*>(store); }

// Connects this rank to all others; blocks until they are connected. `interface_host` is the address to listen on until then;
// `open_ports` receives the number of the rank's ports that still accept connections on return.
dyad_error dyad_gloo_new(void* store, const char* prefix, const char* interface_host, int rank, int world_size,
                         int64_t timeout_ms, int* open_ports, void** group) {
  return guarded([&] {
    auto timeout = std::chrono::milliseconds(timeout_ms);
    auto options = c10d::ProcessGroupGloo::Options::create(timeout);
    std::set<int> opened;
    {
      std::lock_guard<std::mutex> lock(opening);
      auto before = listeners();
      // One TCP connection sends at most a window per round trip, so collectives take turns on several connections.
      for (int connection = 0; connection < CONNECTIONS; ++connection)
        options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(interface_host));
      for (int listener : listeners())
        if (!before.count(listener)) opened.insert(listener);
    }
    // Each worker thread runs one collective at a time; several threads hide the delay of the link. They sleep while they wait,
    // so computation keeps the cores. Every rank starts collectives in the order in which they are issued.
    options->threads = WORKERS;
    auto scoped = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<Store*>(store));
    auto gloo = c10::make_intrusive<ClosableGloo>(scoped, rank, world_size, options);
    *open_ports = 0;
    for (int listener : opened) *open_ports += !deafen(listener);
    *group = new Group{std::move(gloo), std::make_shared<Signal>()};
  });
}

// Makes collectives in flight fail: here at once, on the peers as soon as they see the connection close. Callable from any thread.
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
  // Leak an aborted group: its worker may wait for a dead peer, and the destructor would wait for the worker.
  if (live->signal->aborted) static_cast<void>(live->gloo.release());
  delete live;
}

// Each collective starts in the background and returns a work to wait for.
dyad_error dyad_gloo_all_reduce(void* group, at::Tensor* tensor, void** work) {
  return started(group, work, [&](ClosableGloo& gloo) {
    std::vector<at::Tensor> tensors{*tensor};
    return gloo.allreduce(tensors);
  });
}

// Gathers values [from, from + count) of every rank's input into their places in the concatenation. Gloo gathers into a temporary
// copy, so callers gather in pieces to keep it small.
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

// Waits until the collective is done; fails if it failed or its group was aborted.
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
      // Not wait(): with GCC 12, which builds the wheel, it needs a symbol version that RHEL 9's C++ library lacks.
      while (!signal->changed.wait_for(lock, std::chrono::hours(1), [&] { return *done || signal->aborted; })) {
      }
      if (!*done) throw std::runtime_error("the communicator was aborted");
    }
    pending.work->wait();
  });
}

void dyad_work_free(void* work) { delete static_cast<Work*>(work); }

}  // extern "C"
