#include "rows.h"

#include <cstdlib>
#include <string_view>

namespace dyad {

extern const AllLoops loops_v4, loops_v3, loops_v2;

namespace {

bool has_v4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool has_v3() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// The best loops for this CPU. DYAD_CPU_CAPABILITY can limit them to "avx2" or "default", as ATEN_CPU_CAPABILITY does for libtorch;
// that variable is not used here because libtorch's own attention fails with it on some CPUs.
const AllLoops& chosen() {
  const char* asked = std::getenv("DYAD_CPU_CAPABILITY");
  std::string_view most = asked == nullptr ? "" : asked;
  if (most == "default") return loops_v2;
  if (has_v4() && most != "avx2") return loops_v4;
  return has_v3() ? loops_v3 : loops_v2;
}

}  // namespace

const AllLoops& all_loops() {
  static const AllLoops& loops = chosen();
  return loops;
}

}  // namespace dyad
