// SPDX-License-Identifier: Apache-2.0
// What the processor at hand multiplies fastest, asked at run time: one program serves all machines.
#include "models/decoder.h"

namespace alambic::models {

// AVX2 machines emulate bf16 products some ten times slower than f32; those with AVX512-BF16 or AMX run them two to four
// times faster than f32.
at::ScalarType fastest_compute_type() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16")) return at::kBFloat16;
#endif
  return at::kFloat;
}

}  // namespace alambic::models
