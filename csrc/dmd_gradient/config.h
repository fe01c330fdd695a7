// Sizes that dmd_gradient's backends are built on.
#pragma once

#include "csrc/dmd_gradient/params.h"

namespace rf::dmd_gradient {

// Elements of a sample that are reduced together. Fixed, so that neither threads nor neighbours change a bit:
// inside a tile a tree of depth 11, over the tiles of a sample a running sum in double. 11 roundings of 2^-24
// bound the error of a float32 sum of positive terms by 6.6e-7. The distances are summed in double
// throughout: those of finite data can exceed float32.
constexpr int kTile = 2048;

// Elements in one 16-byte access of the narrower of the two storage types.
inline constexpr int vector_width(int bytes, int prediction_bytes) {
  return 16 / (bytes < prediction_bytes ? bytes : prediction_bytes);
}

// Threads of a CUDA block.
constexpr int kThreads = 256;
// Blocks per SM that the register budget (128 a thread, no spills) leaves room for. In the usual call
// (straight.h) a thread has eight 16-byte loads in flight, so two blocks keep 64 KB per SM under way: more
// than latency x bandwidth of an H200.
constexpr int kBlocksPerProcessor = 2;

}  // namespace rf::dmd_gradient
