// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "core/json.h"
#include "parallel/communicator.h"

namespace alambic::bench {

/// Seconds of each call of a Communicator on f32 tensors of so many bytes: the whole of what is summed or broadcast, and of what is gathered
/// or scattered over all ranks. Medians over `repeats`, each behind a barrier. Collective; ranks of one machine.
///   "size", "bytes"; "sum", "all_gather", "reduce_scatter", "broadcast": {"seconds", "received"}, bytes that a rank gets from others at least;
///   "socket_one_way", "socket_both_ways": the same of a plain TCP connection on 127.0.0.1 between ranks 0 and 1, by blocking sends of all at once.
Json measure_collectives(parallel::Communicator& ranks, std::int64_t bytes, int repeats);

}  // namespace alambic::bench
