// The bulk tensor copy engine: tiles of a rank-5 tensor map to and from shared memory.
#pragma once

#include "csrc/arch/platform.h"

#if defined(__CUDACC__)
#include <cute/arch/copy_sm90_tma.hpp>
#endif

namespace rf::arch {

// Where a tile starts, innermost dimension first.
struct TileCoord {
  int c[5];
};

// What the L2 should do with the lines: K and V are read again by other SMs, Q is read once.
enum class L2Hint { evict_first, evict_last };

#if defined(__CUDACC__)

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

// Elements outside the tensor are not written. The source was written by ordinary stores: every writing
// thread needs fence_proxy_async_shared before the barrier that precedes this call.
RF_DEVICE void tma_store(const TensorMap* map, const void* smem, const TileCoord& x) {
  cute::SM90_TMA_STORE_5D::copy(map, smem, x.c[0], x.c[1], x.c[2], x.c[3], x.c[4]);
}
RF_DEVICE void tma_store_commit() {
  cute::tma_store_arrive();
}
// At most kPending groups of this thread's stores still read shared memory.
template <int kPending>
RF_DEVICE void tma_store_wait() {
  cute::tma_store_wait<kPending>();
}

#else

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

#endif

}  // namespace rf::arch
