// The only door to torch: its stable ABI (target 2.10), so that one binary serves every torch from there on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace rf {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
}  // namespace rf
