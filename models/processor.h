// SPDX-License-Identifier: Apache-2.0
#pragma once
// What fastest_compute_type() (models/decoder.h) makes of a processor's instructions.
#include <c10/core/ScalarType.h>

namespace alambic::models {

/// bf16 where the processor multiplies it natively, f32 elsewhere.
at::ScalarType fastest_compute_type_with(bool has_avx512_bf16, bool has_amx_bf16);

}  // namespace alambic::models
