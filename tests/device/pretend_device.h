// SPDX-License-Identifier: Apache-2.0
#pragma once
// A device for machines without one: libtorch's place for other people's devices (PrivateUse1), whose operators are the processor's. Its
// memory is closed to the program, as a GPU's is: whoever reads or writes it other than through an operator gets a SIGSEGV, and an operator
// that is given tensors of both memories, which a GPU refuses, fails. Linked into a program of its own, as libtorch knows one accelerator
// only.
#include <c10/core/Device.h>

#include <cstdint>

namespace alambic::testing {

inline const at::Device kPretendDevice(c10::DeviceType::PrivateUse1, 0);

/// Operators that were run on it so far; and how often the program wanted to see what they made, for which it would have to wait for a GPU.
std::int64_t operators_run();
std::int64_t times_waited();

/// Makes it known to libtorch; once, before it is used.
void register_pretend_device();

}  // namespace alambic::testing
