// Where Hopper puts things: swizzle, wgmma operand descriptors, register fragments. Pure functions, tested
// against CuTe's own layouts.
#pragma once

#include <cstdint>

namespace chip {

// The address bits that a 32, 64 or 128-byte swizzle exchanges: 16-byte chunks, by the row of an 8-row group.
inline uint32_t swizzle(uint32_t address, uint32_t span_bytes) {
  const uint32_t mask = span_bytes == 128 ? 7 : span_bytes == 64 ? 3 : span_bytes == 32 ? 1 : 0;
  return address ^ (((address >> 7) & mask) << 4);
}

// Byte address of element (mn, k) of a 16-bit operand tile that a shared-memory descriptor describes.
inline uint32_t operand_address(uint64_t desc, int mn, int k, bool mn_major) {
  const uint32_t start = (desc & 0x3fff) << 4;
  const uint32_t leading = ((desc >> 16) & 0x3fff) << 4, stride = ((desc >> 32) & 0x3fff) << 4;
  const int type = static_cast<int>(desc >> 62);
  const uint32_t span = type == 1 ? 128 : type == 2 ? 64 : type == 3 ? 32 : 16;
  uint32_t address;
  if (mn_major) {
    const int per_block = static_cast<int>(span / 2);
    address = start + (mn / per_block) * leading + (mn % per_block) * 2 + (k / 8) * stride + (k % 8) * span;
  } else {
    address = start + (mn / 8) * stride + (mn % 8) * span +
              (type != 0 ? k * 2 : static_cast<int>((k / 8) * leading + (k % 8) * 2));
  }
  return swizzle(address, type != 0 ? span : 0);
}

struct FragmentCoord {
  int row, col;
};
// Element i of thread t's accumulator of a 64 x N product.
inline FragmentCoord accumulator_coord(int t, int i) {
  return {(t / 32) * 16 + (t % 32) / 4 + 8 * ((i >> 1) & 1), (i / 4) * 8 + (t % 4) * 2 + (i & 1)};
}
// Half h of register j of thread t's 64 x 16 A operand.
inline FragmentCoord a_operand_coord(int t, int j, int h) {
  return {(t / 32) * 16 + (t % 32) / 4 + 8 * (j & 1), (t % 4) * 2 + h + 8 * (j >> 1)};
}

}  // namespace chip
