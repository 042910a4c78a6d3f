// SPDX-License-Identifier: Apache-2.0
#include "core/vector_loops.h"

namespace alambic {

VectorWidth vector_width() {
#if defined(__x86_64__)
  static const VectorWidth width = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? VectorWidth::kAvx512 : avx2 ? VectorWidth::kAvx2 : VectorWidth::kPlain;
  }();
  return width;
#else
  return VectorWidth::kPlain;
#endif
}

}  // namespace alambic
