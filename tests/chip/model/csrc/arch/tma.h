// The bulk tensor copy engine: tiles of a rank-5 tensor map to and from shared memory.
#pragma once

#include "csrc/arch/platform.h"
#include "csrc/arch/tile.h"

namespace rf::arch {

RF_DEVICE void tma_prefetch_map(const TensorMap*) {}
template <L2Hint kHint>
RF_DEVICE void tma_load(const TensorMap* map, uint64_t* barrier, void* smem, const TileCoord& x) {
  chip::tma_load(map, barrier, smem, x.c);
}
RF_DEVICE void tma_store(const TensorMap* map, const void* smem, const TileCoord& x) {
  chip::tma_store(map, smem, x.c);
}
RF_DEVICE void tma_store_commit() {
  chip::tma_store_commit();
}
template <int kPending>
RF_DEVICE void tma_store_wait() {
  chip::tma_store_wait(kPending);
}

}  // namespace rf::arch
