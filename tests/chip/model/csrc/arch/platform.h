// csrc/arch on the functional model: calls into the machine, which runs a kernel as fibers and looks for
// missing waits, fences and bounds. This folder comes before the repository on the include path.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/arch/limits.h"
#include "csrc/math/dtype.h"
#include "tests/chip/model/machine.h"

#define RF_DEVICE inline

namespace rf::arch {

using TensorMap = chip::TensorMap;

}  // namespace rf::arch
