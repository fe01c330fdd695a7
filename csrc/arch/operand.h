// Descriptors of matrix operands in shared memory.
#pragma once

#include "csrc/arch/platform.h"

namespace rf::arch {

// Shared-memory descriptor of a 16-bit operand under SWIZZLE_128B (64 elements = one row of 128 bytes, 8-row
// groups of 1,024 bytes, tile 1,024-byte aligned). The high word is a constant and shared addresses end below
// 256 KiB, so a step inside a tile is one addition to the low word, without carry.
struct OperandDesc {
  uint32_t lo;

  static constexpr uint32_t kHi =
      (kSwizzleAtomBytes >> 4) | (1u << 30);  // stride between 8-row groups, SWIZZLE_128B

  RF_DEVICE uint64_t at(uint32_t step_bytes) const {
    return static_cast<uint64_t>(kHi) << 32 | (lo + (step_bytes >> 4));
  }
};

// K-major (Q and K): a step of 16 along k inside the 128-byte row is 32 bytes; the leading offset is unused.
RF_DEVICE OperandDesc operand_k_major(uint32_t shared_address) {
  return {(shared_address >> 4) | (1u << 16)};
}
// MN-major (V): `block_bytes` is the distance of neighbouring 64-wide column blocks; a step of 16 along k is
// 2,048 bytes.
RF_DEVICE OperandDesc operand_mn_major(uint32_t shared_address, uint32_t block_bytes) {
  return {(shared_address >> 4) | ((block_bytes >> 4) << 16)};
}

}  // namespace rf::arch
