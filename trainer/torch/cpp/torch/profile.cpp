// libtorch's profiler (Kineto): operators with times and shapes, spans, kernels, allocations.
#include "bridge.h"

#include <ATen/record_function.h>
#include <kineto/ActivityType.h>
#include <torch/csrc/autograd/profiler_kineto.h>

namespace profiler = torch::profiler::impl;

extern "C" {

using dyad_event_sink = void (*)(void* context, const dyad_event* event);

// Starts to record this thread; with `cuda` also the GPU, with `memory` also allocations.
dyad_error dyad_profile_start(bool cuda, bool memory) {
  return guarded([&] {
    profiler::ProfilerConfig config(profiler::ProfilerState::KINETO, /*report_input_shapes=*/true,
                                    /*profile_memory=*/memory);
    std::set<profiler::ActivityType> activities{profiler::ActivityType::CPU};
    if (cuda) activities.insert(profiler::ActivityType::CUDA);
    torch::autograd::profiler::prepareProfiler(config, activities);
    torch::autograd::profiler::enableProfiler(config, activities);
  });
}

// Stops recording, writes a Chrome trace to `path` unless it is null, and passes every event to the sink.
dyad_error dyad_profile_stop(const char* path, dyad_event_sink sink, void* context) {
  return guarded([&] {
    auto result = torch::autograd::profiler::disableProfiler();
    if (path != nullptr) result->save(path);
    for (const auto& event : result->events()) {
      // Skip Kineto's copy of a span on the accelerator: it covers kernels that have events of their own.
      if (event.activityType() == static_cast<uint8_t>(libkineto::ActivityType::GPU_USER_ANNOTATION)) continue;
      std::vector<int64_t> shapes;
      for (const auto& shape : event.shapes()) {
        shapes.push_back(static_cast<int64_t>(shape.size()));
        shapes.insert(shapes.end(), shape.begin(), shape.end());
      }
      std::string kinds;
      for (const auto& kind : event.dtypes()) kinds.append(kind).push_back('\n');
      auto name = event.name();
      dyad_event plain{name.c_str(),
                       event.startThreadId(),
                       event.startNs(),
                       event.durationNs(),
                       event.nBytes(),
                       shapes.data(),
                       shapes.size(),
                       kinds.c_str(),
                       event.scope() == static_cast<uint8_t>(at::RecordScope::USER_SCOPE),
                       event.deviceType() != c10::DeviceType::CPU};
      sink(context, &plain);
    }
  });
}

// Begins a named part of the program on this thread; dyad_span_end ends it. Cheap while the profiler is off.
void* dyad_span_begin(const char* name, size_t length) {
  auto* span = new at::RecordFunction(at::RecordScope::USER_SCOPE);
  if (span->isActive()) span->before(std::string(name, length));
  return span;
}

void dyad_span_end(void* span) { delete static_cast<at::RecordFunction*>(span); }

}  // extern "C"
