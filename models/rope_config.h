// SPDX-License-Identifier: Apache-2.0
#pragma once
// The RoPE part of config.json: "rope_parameters" as transformers 5 writes it, or the older "rope_scaling", "rope_theta",
// "rope_local_base_freq" and "partial_rotary_factor"; and the frequencies that follow from it.
#include "models/config.h"
#include "models/config_reader.h"

namespace alambic::models {

/// Fills config.rope, and config.local_rope where the family has one. family, head_size and max_positions are set already.
void read_rope(ConfigReader& reader, ModelConfig& config, std::vector<std::string>& problems);

}  // namespace alambic::models
