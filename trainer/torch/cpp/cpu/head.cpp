// The LM head's work on a tile of logits on the CPU, a row at a time while it is in cache. Float32 and bfloat16 logits; all
// arithmetic is float32, but a log-probability is float64: of a long sequence's sum, float32 would leave four digits.
#include "bridge.h"
#include "gpu.h"

#include <vector>

#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include "rows.h"
#include "tensors.h"

// Null where there is no tensor.
template <typename T>
static T* data_or_null(at::Tensor* tensor) {
  return tensor == nullptr ? nullptr : data<T>(*tensor);
}

extern "C" {

// Turns each row of the policy's logits into the log-probability of its target and, where `keep` is set, into what each
// probability is above what was to be (softmax - onehot), in place. With a reference's logits, also its log-probabilities and
// each row's KL(policy || reference). All tensors are contiguous and on the CPU: logits `[rows, columns]` of one kind, float32
// or bfloat16; int64 targets, float64 log-probabilities and float32 divergences `[rows]`. `reference`, `reference_logps` and
// `kl` are null together. `gpu_path` takes the GPU's kernel, in bfloat16.
dyad_error dyad_head_score(at::Tensor* policy, at::Tensor* reference, at::Tensor* targets, at::Tensor* logps,
                           at::Tensor* reference_logps, at::Tensor* kl, bool keep, bool gpu_path) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::head_score", std::vector<c10::IValue>{*policy});
    if (gpu_path) return dyad::head_score(*policy, reference, *targets, *logps, reference_logps, kl, keep);
    by_kind(*policy, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      dyad::Tile<T> tile{data<T>(*policy),
                   data_or_null<T>(reference),
                   data<int64_t>(*targets),
                   data<double>(*logps),
                   data_or_null<double>(reference_logps),
                   data_or_null<float>(kl),
                   policy->size(1)};
      at::parallel_for(0, policy->size(0), 1, [&](int64_t begin, int64_t end) {
        std::vector<float> terms(keep ? tile.columns + dyad::ROOM : 0);
        dyad::loops<T>().score(tile, begin, end, keep ? terms.data() : nullptr);
      });
    });
  });
}

}  // extern "C"
