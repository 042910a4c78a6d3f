// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace alambic {

/// Makes malloc keep what is freed instead of giving it back to the system. A training step frees and asks for the same large
/// tensors over and over; given back, each costs its page faults again (a tenth to a third of a step on two cores). Called
/// once, at the start of a program that trains. Bounds the kernels that oneDNN keeps, too: each shape of a product that it has
/// seen holds memory, and in its 1,024 places a long run with rows of many lengths would collect gigabytes.
void keep_freed_memory();

}  // namespace alambic
