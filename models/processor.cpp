// SPDX-License-Identifier: Apache-2.0
// What the processor at hand multiplies fastest, asked at run time: one program serves all machines.
#include "models/processor.h"

#include "models/decoder.h"

namespace alambic::models {

// AVX2 machines emulate bf16 products some ten times slower than f32; those with AVX512-BF16 or AMX run them two to four
// times faster than f32.
at::ScalarType fastest_compute_type_with(bool has_avx512_bf16, bool has_amx_bf16) { return has_avx512_bf16 || has_amx_bf16 ? at::kBFloat16 : at::kFloat; }

at::ScalarType fastest_compute_type() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return fastest_compute_type_with(__builtin_cpu_supports("avx512bf16"), __builtin_cpu_supports("amx-bf16"));
#else
  return fastest_compute_type_with(false, false);
#endif
}

}  // namespace alambic::models
