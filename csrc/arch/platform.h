// The hardware layer: csrc/arch is the only code that touches the chip, and holds what kernels call:
// CUTLASS's arch atoms and PTX.
//
// One kernel source, two machines. The functional model of the chip (tests/chip/model) has headers of the
// same names and meaning in its own csrc/arch, which a build for g++ puts first on the include path.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "csrc/arch/limits.h"
#include "csrc/math/dtype.h"

#define RF_DEVICE __device__ __forceinline__

namespace rf::arch {

using TensorMap = CUtensorMap;

}  // namespace rf::arch
