#include "cpu/isa.h"

#include <atomic>

namespace fastedit {

Isa best_isa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::none;
}

const char* processor_vendor() {
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") ? "intel" : __builtin_cpu_is("amd") ? "amd" : "other";
}

static std::atomic<Isa> chosen{best_isa()};

Isa current_isa() {
  return chosen.load(std::memory_order_relaxed);
}

void use_isa(Isa isa) {
  chosen.store(isa, std::memory_order_relaxed);
}

}  // namespace fastedit
