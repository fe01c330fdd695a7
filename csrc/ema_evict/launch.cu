// CUDA backend: one launch, one thread block a row of kernel.h. Schedule, turns and alpha are read from
// device memory, so a captured graph can be replayed with another plan in the same place.
#include <algorithm>

#include "csrc/common/cuda_call.h"
#include "csrc/ema_evict/kernel.h"
#include "csrc/ema_evict/launch.h"

namespace rf::ema_evict {
namespace {

// Three blocks an SM leave up to 112 registers a thread; of the limits tried (64, 80, 112), the first under
// which the half-precision kernels spill on no architecture. float32 and float64 need two blocks for that
// (sm_120).
template <typename T>
constexpr int kMinBlocks = sizeof(T) == 2 ? 3 : 2;

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

template <typename T, EmaState kState, int N>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    evict_kernel(const __grid_constant__ Params p, int first) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (row >= p.batch * p.sink_frames * p.frame_tokens) return;
  evict_row<T, kState, N>(p, row, first,
                          BlockLanes{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)});
}

template <typename T, EmaState kState, int N>
CudaStatus launch(const Params& p, const Config& config, void* stream) {
  const int64_t rows = p.batch * p.sink_frames * p.frame_tokens;
  // x is as wide as a grid may be; only a cache of more than 2^31 sink tokens needs a second row of blocks.
  const int64_t x = std::min<int64_t>(rows, INT32_MAX);
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>((rows + x - 1) / x));
  // One launch: a second only where more than kGroup frames may go into one sink frame.
  for (int first = 0; first == 0 || first < p.sources; first += kGroup) {
    const CudaStatus status = launch_kernel("launch of evict_kernel", evict_kernel<T, kState, N>, grid,
                                            config.threads, 0, stream, p, first);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

CudaStatus run_cuda(const Params& p, const Config& config, void* stream) {
  return with_state(p, [&]<typename T, EmaState kState>() {
    constexpr int kVector = 16 / sizeof(T);
    return config.vector == kVector ? launch<T, kState, kVector>(p, config, stream)
                                    : launch<T, kState, 1>(p, config, stream);
  });
}

}  // namespace rf::ema_evict
