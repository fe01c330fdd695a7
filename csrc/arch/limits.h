// Numbers of sm_90.
#pragma once

namespace rf::arch {

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
