// Scores a tile of the LM head's logits on the CPU, a row at a time while it is in cache. Logits are float32 or bfloat16, arithmetic
// is float32. Log-probabilities are float64: in the sum over a long sequence float32 would keep only four digits.
#include "bridge.h"
#include "gpu.h"

#include <vector>

#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include "rows.h"
#include "tensors.h"

// Null if `tensor` is null.
template <typename T>
static T* data_or_null(at::Tensor* tensor) {
  return tensor == nullptr ? nullptr : data<T>(*tensor);
}

extern "C" {

// Writes the log-probability of each row's target under the policy. With `keep` also overwrites the policy's logits with the errors
// `softmax - onehot`. With a reference also writes its log-probabilities. `facts` gets the values of `RowFacts` of each row; it may be
// null. All tensors are contiguous: logits `[rows, columns]` of one kind, float32 or bfloat16; int64 targets and float64
// log-probabilities `[rows]`, float32 facts `[rows, 5]`. Either both of `reference` and `reference_logps` are null, or none is.
// `gpu_path` uses the GPU kernel, which needs bfloat16; otherwise tensors are on the CPU.
dyad_error dyad_head_score(at::Tensor* policy, at::Tensor* reference, at::Tensor* targets, at::Tensor* logps,
                           at::Tensor* reference_logps, at::Tensor* facts, bool keep, bool gpu_path) {
  return guarded([&] {
    RECORD_FUNCTION("dyad::head_score", std::vector<c10::IValue>{*policy});
    if (gpu_path) return dyad::head_score(*policy, reference, *targets, *logps, reference_logps, facts, keep);
    by_kind(*policy, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      dyad::Tile<T> tile{data<T>(*policy),
                   data_or_null<T>(reference),
                   data<int64_t>(*targets),
                   data<double>(*logps),
                   data_or_null<double>(reference_logps),
                   reinterpret_cast<dyad::RowFacts*>(data_or_null<float>(facts)),
                   policy->size(1)};
      at::parallel_for(0, policy->size(0), 1, [&](int64_t begin, int64_t end) {
        std::vector<float> terms(keep ? tile.columns + dyad::ROOM : 0);
        dyad::loops<T>().score(tile, begin, end, keep ? terms.data() : nullptr);
      });
    });
  });
}

}  // extern "C"
