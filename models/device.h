// SPDX-License-Identifier: Apache-2.0
#pragma once
// A decoder in the memory of another device than a processor, where ATen's operators compute it (models/decoder.cpp) and what is a loop
// over a processor's memory elsewhere has a twin named ..._by_operators, which tests call with tensors of a processor.
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace alambic::models {

struct Decoder;

/// All that a decoder holds to `device`: weights, quantised ones too, norms, adapters, trained rows. What was one tensor stays one, and what
/// trains stays a leaf that does; but they are other tensors than before. Error(kBug) after use_fused_blocks().
void move_to(Decoder& decoder, at::Device device);

/// A generator of the device's own numbers, seeded anew: what it draws is a function of the seed, of how much is drawn and of the kind of
/// device. No state of it lives on.
inline at::Generator generator_on(at::Device device, std::uint64_t seed) {
  at::Generator generator = at::globalContext().defaultGenerator(device).clone();
  generator.set_current_seed(seed);
  return generator;
}

}  // namespace alambic::models
