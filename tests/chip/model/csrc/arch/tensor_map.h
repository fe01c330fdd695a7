// Host side of TMA: describing a strided [B, T, H, D] tensor of 16-bit elements to the copy engine.
#pragma once

#include "csrc/arch/platform.h"
#include "csrc/arch/tile.h"

namespace rf::arch {

inline int encode_tensor_map(TensorMap* map, const TileSource& source) {
  const detail::Rank5 r = detail::rank5(source);
  map->base = static_cast<char*>(const_cast<void*>(source.data));
  map->element_bytes = 2;
  map->swizzle_bytes = kSwizzleBytes;
  for (int i = 0; i < 5; ++i) {
    map->size[i] = r.size[i];
    map->stride_bytes[i] = r.stride_bytes[i];
    map->box[i] = r.box[i];
  }
  return 0;
}

}  // namespace rf::arch
