// The bulk tensor copy engine: tiles of a rank-5 tensor map to shared memory.
#pragma once

#include "csrc/arch/platform.h"
#include "csrc/arch/tile.h"

#include <cute/arch/copy_sm90_tma.hpp>

namespace rf::arch {

RF_DEVICE void tma_prefetch_map(const TensorMap* map) {
  cute::prefetch_tma_descriptor(map);
}

// One thread issues it; the bytes of the whole box are counted on `barrier`. Elements outside the tensor
// arrive as zeros and are counted too.
template <L2Hint kHint>
RF_DEVICE void tma_load(const TensorMap* map, uint64_t* barrier, void* smem, const TileCoord& x) {
  const uint64_t hint =
      static_cast<uint64_t>(kHint == L2Hint::evict_last ? cute::TMA::CacheHintSm90::EVICT_LAST
                                                        : cute::TMA::CacheHintSm90::EVICT_FIRST);
  cute::SM90_TMA_LOAD_5D::copy(map, barrier, hint, smem, x.c[0], x.c[1], x.c[2], x.c[3], x.c[4]);
}

}  // namespace rf::arch
