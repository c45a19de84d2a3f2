// Kernels for operators between matrix products on GPUs. Each reads and writes bfloat16 and computes in float32. NVRTC compiles them
// when a run starts (`src/gpu.rs`). They include no headers, so that none need to be installed.

typedef unsigned short Bf16;

// Eight neighbouring values, read and written at once.
struct __align__(16) Eight {
  unsigned int pairs[4];
};

__device__ float first(unsigned int pair) { return __uint_as_float(pair << 16); }
__device__ float second(unsigned int pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ float wide(Bf16 value) { return __uint_as_float(static_cast<unsigned int>(value) << 16); }

// Rounds two values to nearest, ties to even, and packs them into a pair.
__device__ unsigned int narrow(float one, float two) {
  unsigned int pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(two), "f"(one));
  return pair;
}

// Minus infinity.
__device__ float none() { return __int_as_float(0xff800000); }

__device__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

// `silu(gate) * up`.
extern "C" __global__ void gpu_swiglu(const Eight* gate, const Eight* up, Eight* y, long long eights) {
  long long at = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (at >= eights) return;
  Eight g = gate[at], u = up[at], out;
  for (int k = 0; k < 4; ++k) {
    float one = first(g.pairs[k]), two = second(g.pairs[k]);
    out.pairs[k] = narrow(one * sigmoid(one) * first(u.pairs[k]), two * sigmoid(two) * second(u.pairs[k]));
  }
  y[at] = out;
}

// Derivatives of SwiGLU with respect to gate and up.
__device__ void swiglu_back(float dy, float g, float u, float& dg, float& du) {
  float s = sigmoid(g);
  dg = dy * u * s * (1.0f + g * (1.0f - s));
  du = dy * g * s;
}

extern "C" __global__ void gpu_swiglu_backward(const Eight* dy, const Eight* gate, const Eight* up, Eight* dgate, Eight* dup,
                                                long long eights) {
  long long at = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (at >= eights) return;
  Eight d = dy[at], g = gate[at], u = up[at], dg, du;
  for (int k = 0; k < 4; ++k) {
    float dg1, du1, dg2, du2;
    swiglu_back(first(d.pairs[k]), first(g.pairs[k]), first(u.pairs[k]), dg1, du1);
    swiglu_back(second(d.pairs[k]), second(g.pairs[k]), second(u.pairs[k]), dg2, du2);
    dg.pairs[k] = narrow(dg1, dg2);
    du.pairs[k] = narrow(du1, du2);
  }
  dgate[at] = dg;
  dup[at] = du;
}

// Rotates `[tokens, heads, width]` by angles `[tokens, width]`. The first half of each row of sines is negated. `half` is half a
// head's width in eights; `sign` is -1 to rotate backwards. Each thread rotates eight pairs.
extern "C" __global__ void gpu_rotate(const Eight* x, const Eight* cosines, const Eight* sines, Eight* y, long long count,
                                       int heads, int half, float sign) {
  long long at = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (at >= count) return;
  long long head = at / half, left = head * 2 * half + at % half, angle = head / heads * 2 * half + at % half;
  Eight a = x[left], b = x[left + half], ca = cosines[angle], cb = cosines[angle + half], sa = sines[angle],
        sb = sines[angle + half], ya, yb;
  for (int k = 0; k < 4; ++k) {
    float a1 = first(a.pairs[k]), a2 = second(a.pairs[k]), b1 = first(b.pairs[k]), b2 = second(b.pairs[k]);
    ya.pairs[k] = narrow(a1 * first(ca.pairs[k]) + sign * b1 * first(sa.pairs[k]),
                         a2 * second(ca.pairs[k]) + sign * b2 * second(sa.pairs[k]));
    yb.pairs[k] = narrow(b1 * first(cb.pairs[k]) + sign * a1 * first(sb.pairs[k]),
                         b2 * second(cb.pairs[k]) + sign * a2 * second(sb.pairs[k]));
  }
  y[left] = ya;
  y[left + half] = yb;
}

// Each row of `y` is the sum of its copies in `x`: rows `places[starts[row]]` to `places[starts[row + 1] - 1]`. `y` has `count`
// eights, `eights` per row.
extern "C" __global__ void gpu_fold(const Eight* x, const int* starts, const int* places, Eight* y, long long count, int eights) {
  long long at = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (at >= count) return;
  long long row = at / eights, column = at % eights;
  float sums[8] = {};
  for (int place = starts[row]; place < starts[row + 1]; ++place) {
    Eight copy = x[static_cast<long long>(places[place]) * eights + column];
    for (int k = 0; k < 4; ++k) {
      sums[2 * k] += first(copy.pairs[k]);
      sums[2 * k + 1] += second(copy.pairs[k]);
    }
  }
  Eight total;
  for (int k = 0; k < 4; ++k) total.pairs[k] = narrow(sums[2 * k], sums[2 * k + 1]);
  y[at] = total;
}

// The largest number of threads of a block that uses the reductions below; the number must be a multiple of 32.
constexpr int kThreads = 1024, kWarps = kThreads / 32;

__device__ int warps() { return blockDim.x / 32; }

// A sum of exponentials relative to the largest exponent.
struct Exponentials {
  float largest, sum;
};

__device__ Exponentials both(Exponentials a, Exponentials b) {
  // If both are -inf, `-inf - -inf` would be NaN.
  float largest = fmaxf(a.largest, b.largest), base = largest == none() ? 0.0f : largest;
  return {largest, a.sum * __expf(a.largest - base) + b.sum * __expf(b.largest - base)};
}

__device__ void add(Exponentials& total, Eight values) {
  float largest = none();
  for (int k = 0; k < 4; ++k) largest = fmaxf(largest, fmaxf(first(values.pairs[k]), second(values.pairs[k])));
  float base = largest == none() ? 0.0f : largest, sum = 0.0f;
  for (int k = 0; k < 4; ++k) sum += __expf(first(values.pairs[k]) - base) + __expf(second(values.pairs[k]) - base);
  total = both(total, {largest, sum});
}

// Log-sum-exp over all threads of the block; every thread gets the result.
__device__ float log_sum(Exponentials own) {
  __shared__ Exponentials shared[kWarps];
  for (int step = 16; step > 0; step /= 2)
    own = both(own, {__shfl_xor_sync(~0u, own.largest, step), __shfl_xor_sync(~0u, own.sum, step)});
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  Exponentials total = shared[0];
  for (int warp = 1; warp < warps(); ++warp) total = both(total, shared[warp]);
  return total.largest + logf(total.sum);
}

__device__ float sum_of(float own) {
  __shared__ float shared[kWarps];
  for (int step = 16; step > 0; step /= 2) own += __shfl_xor_sync(~0u, own, step);
  // Threads may still read the result of an earlier sum.
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < warps(); ++warp) total += shared[warp];
  return total;
}

// What is stored about each row of logits z with p = softmax(z): as `RowFacts` of `cpu/rows.h`.
struct RowFacts {
  float kl, mean_logit, entropy, log_sum_sq, is_top1;
};

// Takes the place of minus infinity where it is multiplied by a probability of 0, which would give NaN.
constexpr float kLowest = -1.0e30f;

// A thread's part of the sums over a row.
struct RowSums {
  float above, spread, mass, squares, beaten;
};

// Adds one logit z with log-probability `own`; `other` is the reference's log-probability.
__device__ void add(RowSums& sums, float z, float own, float other, float p, bool beats) {
  float log_p = fmaxf(own, kLowest);
  sums.above += p * (log_p - fmaxf(other, kLowest));
  sums.spread += z;
  sums.mass += p * log_p;
  sums.squares += p * p;
  sums.beaten += beats ? 1.0f : 0.0f;
}

// Scores one row of logits (`eights` eights) per block: log-probability of its target, the same under a reference, and the facts about
// it. With `keep` errors `softmax - onehot` overwrite the logits. The reference and the facts may be null.
extern "C" __global__ void __launch_bounds__(kThreads)
    gpu_head(Eight* logits, const Eight* reference, const long long* targets, double* logps, double* reference_logps, RowFacts* facts,
              int eights, int keep) {
  __shared__ float aim;
  long long row = blockIdx.x;
  Eight* z = logits + row * eights;
  const Eight* w = reference == nullptr ? nullptr : reference + row * eights;
  int target = static_cast<int>(targets[row]);
  Exponentials ours = {none(), 0.0f}, theirs = ours;
  for (int at = threadIdx.x; at < eights; at += blockDim.x) {
    add(ours, z[at]);
    if (w != nullptr) add(theirs, w[at]);
  }
  float lse = log_sum(ours), reference_lse = w == nullptr ? lse : log_sum(theirs);
  if (threadIdx.x == 0) {
    aim = wide(reinterpret_cast<const Bf16*>(z)[target]);
    logps[row] = static_cast<double>(aim) - lse;
    if (w != nullptr) reference_logps[row] = static_cast<double>(wide(reinterpret_cast<const Bf16*>(w)[target])) - reference_lse;
  }
  if (facts == nullptr && !keep) return;
  // Errors must not overwrite the target's logit before thread 0 has read it.
  __syncthreads();
  float best = aim;
  RowSums sums = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int at = threadIdx.x; at < eights; at += blockDim.x) {
    Eight own = z[at], other = w == nullptr ? own : w[at];
    for (int k = 0; k < 4; ++k) {
      int index = 8 * at + 2 * k;
      float a = first(own.pairs[k]), b = second(own.pairs[k]), p = __expf(a - lse), q = __expf(b - lse);
      add(sums, a, a - lse, first(other.pairs[k]) - reference_lse, p, a > best || (a == best && index < target));
      add(sums, b, b - lse, second(other.pairs[k]) - reference_lse, q, b > best || (b == best && index + 1 < target));
      own.pairs[k] = narrow(index == target ? p - 1.0f : p, index + 1 == target ? q - 1.0f : q);
    }
    if (keep) z[at] = own;
  }
  if (facts == nullptr) return;
  float kl = sum_of(sums.above), spread = sum_of(sums.spread), mass = sum_of(sums.mass), squares = sum_of(sums.squares),
        beaten = sum_of(sums.beaten);
  if (threadIdx.x == 0)
    facts[row] = {w == nullptr ? 0.0f : kl, spread / (8.0f * eights), -mass, logf(squares), beaten == 0.0f ? 1.0f : 0.0f};
}
