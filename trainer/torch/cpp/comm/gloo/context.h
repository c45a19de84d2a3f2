// The PyTorch wheel ships ProcessGroupGloo.hpp and the compiled gloo, but not gloo's own headers. These declarations
// stand in for the few members that the header mentions; the definitions are those inside libtorch_cpu.so.
// Never construct any of these types here: their real layout is known to libtorch alone.
#pragma once

#include <chrono>
#include <memory>

#include <gloo/transport/device.h>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
  void closeConnections();
};

}  // namespace gloo
