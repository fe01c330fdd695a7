// CUDA backend: one launch, one thread block a row of kernel.h. Schedule, turns and alpha are read from
// device memory, so a captured graph can be replayed with another plan in the same place.
#include <algorithm>

#include "csrc/common/cuda_call.h"
#include "csrc/ema_evict/kernel.h"
#include "csrc/ema_evict/launch.h"

namespace rf::ema_evict {
namespace {

struct BlockLanes {
  int lane, lanes;
  // Reached by every thread of the block: the number of sources is the row's.
  RF_HD bool all(bool mine) const {
#if defined(__CUDA_ARCH__)
    return __syncthreads_and(mine) != 0;
#else
    return mine;
#endif
  }
  RF_HD void count(int64_t* counter, int n) const {
#if defined(__CUDA_ARCH__)
    if (lane == 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(n));
#endif
  }
};

// A row to a block, and more where a grid is not that large.
template <typename T, EmaState kState, int N, bool kHeld>
__global__ void __launch_bounds__(max_threads(kState, kHeld), 1)
    evict_kernel(const __grid_constant__ Params p, const __grid_constant__ Units units, int first) {
  const BlockLanes lanes{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t j = blockIdx.y; j < p.sink_frames; j += gridDim.y)
      for (int64_t t = blockIdx.x; t < p.frame_tokens; t += gridDim.x)
        evict_row<T, kState, N, kHeld>(p, units, b, j, t, first, lanes);
}

template <typename T, EmaState kState, int N, bool kHeld>
CudaStatus launch(const Params& p, const Config& config, void* stream) {
  constexpr int64_t kMaxX = INT32_MAX, kMaxYZ = 65535;
  const dim3 grid(static_cast<unsigned>(std::min(p.frame_tokens, kMaxX)),
                  static_cast<unsigned>(std::min(p.sink_frames, kMaxYZ)),
                  static_cast<unsigned>(std::min(p.batch, kMaxYZ)));
  // One launch: a second only where more than kGroup frames may go into one sink frame.
  for (int first = 0; first == 0 || first < p.sources; first += kGroup) {
    const CudaStatus status = launch_kernel("launch of evict_kernel", evict_kernel<T, kState, N, kHeld>, grid,
                                            config.threads, 0, stream, p, config.units, first);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

CudaStatus run_cuda(const Params& p, const Config& config, void* stream) {
  return with_state(p, [&]<typename T, EmaState kState>() {
    constexpr int kVector = 16 / sizeof(T);
    if (config.vector != kVector) return launch<T, kState, 1, false>(p, config, stream);
    return config.held ? launch<T, kState, kVector, true>(p, config, stream)
                       : launch<T, kState, kVector, false>(p, config, stream);
  });
}

}  // namespace rf::ema_evict
