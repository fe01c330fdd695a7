// The hardware layer: csrc/arch is the only code that touches the chip.
//
// One kernel source, two machines. Under nvcc these headers are CUTLASS arch atoms or PTX; under g++ they are
// calls into a functional model of the chip (csrc/arch/model), which runs a kernel as fibers and looks for
// missing waits, fences and bounds. Names and meaning are the same on both.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/math/dtype.h"

#if defined(__CUDACC__)
#include <cuda.h>
#define RF_DEVICE __device__ __forceinline__
#else
#include "csrc/arch/model/machine.h"
#define RF_DEVICE inline
#endif

namespace rf::arch {

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = chip::TensorMap;
#endif

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kMaxSharedBytes = 232448;  // 227 KiB: what one CTA can have on sm_90
constexpr int kRegistersPerSm = 65536;
constexpr int kRegisterGranularity = 8;  // registers per thread are handed out in eights
constexpr int kSwizzleBytes = 128;       // SWIZZLE_128B: rows of 128 bytes, groups of 8 rows
constexpr int kSwizzleAtomBytes = 1024;  // alignment of every swizzled tile

// Named barriers: id 0 is __syncthreads.
constexpr int kNamedBarriers = 16;

}  // namespace rf::arch
