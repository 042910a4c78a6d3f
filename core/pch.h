// SPDX-License-Identifier: Apache-2.0
#pragma once
// The one precompiled header: what nearly every tensor file needs and no more (torch/torch.h costs five times as much).
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
