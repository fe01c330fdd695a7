// CUDA backend: one launch, one thread block a row of kernel.h, or a few rows of held.h. Schedule, turns and
// alpha are read from device memory, so a captured graph can be replayed with another plan in the same place.
#include <algorithm>

#include "csrc/common/cuda_call.h"
#include "csrc/ema_evict/held.h"
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
template <typename T, EmaState kState, int N>
__global__ void __launch_bounds__(max_threads(kState, false), 1)
    evict_kernel(const __grid_constant__ Params p, const __grid_constant__ Units units, int first) {
  const BlockLanes lanes{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t j = blockIdx.y; j < p.sink_frames; j += gridDim.y)
      for (int64_t t = blockIdx.x; t < p.frame_tokens; t += gridDim.x)
        evict_row<T, kState, N>(p, units, b, j, t, first, lanes);
}

template <typename T, EmaState kState, int N>
__global__ void __launch_bounds__(max_threads(kState, true), 1)
    evict_held_kernel(const __grid_constant__ Params p, const __grid_constant__ Units units) {
  const BlockLanes lanes{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)};
  const int64_t begin = int64_t{kHeldRows} * blockIdx.x;
  const int64_t left = p.frame_tokens - begin;
  const int rows = static_cast<int>(left < kHeldRows ? left : kHeldRows);
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z)
    for (int64_t j = blockIdx.y; j < p.sink_frames; j += gridDim.y) {
      HeldLane<T, kState, N> lane(p, units, b, j, begin, lanes.lane);
      int skipped = 0;
      if (lane.usual()) {
        RF_NO_UNROLL
        for (int r = 0; r < rows; ++r, lane.advance()) {
          lane.template read<true>();
          if (!lane.votes() || lanes.all(lane.finite())) {
            lane.template write<true>(true);
          } else {
            ++skipped;
            lane.template write<false>(false);
          }
        }
      } else {
        RF_NO_UNROLL
        for (int r = 0; r < rows; ++r, lane.advance()) {
          lane.template read<false>();
          const bool finite = !lane.votes() || lanes.all(lane.finite());
          skipped += !finite;
          lane.template write<false>(lane.fuses() && finite);
        }
      }
      if (skipped != 0 && p.skipped != nullptr) lanes.count(p.skipped, skipped);
    }
}

constexpr int64_t kMaxX = INT32_MAX, kMaxYZ = 65535;

dim3 grid_of(const Params& p, int rows) {
  return dim3(static_cast<unsigned>(std::min((p.frame_tokens + rows - 1) / rows, kMaxX)),
              static_cast<unsigned>(std::min(p.sink_frames, kMaxYZ)),
              static_cast<unsigned>(std::min(p.batch, kMaxYZ)));
}

template <typename T, EmaState kState, int N>
CudaStatus launch(const Params& p, const Config& config, void* stream) {
  // One launch: a second only where more than kGroup frames may go into one sink frame.
  for (int first = 0; first == 0 || first < p.sources; first += kGroup) {
    const CudaStatus status = launch_kernel("launch of evict_kernel", evict_kernel<T, kState, N>,
                                            grid_of(p, 1), config.threads, 0, stream, p, config.units, first);
    if (!status.ok()) return status;
  }
  return {};
}

template <typename T, EmaState kState, int N>
CudaStatus launch_held(const Params& p, const Config& config, void* stream) {
  return launch_kernel("launch of evict_held_kernel", evict_held_kernel<T, kState, N>, grid_of(p, kHeldRows),
                       config.threads, 0, stream, p, config.units);
}

}  // namespace

CudaStatus run_cuda(const Params& p, const Config& config, void* stream) {
  return with_state(p, [&]<typename T, EmaState kState>() {
    constexpr int kVector = 16 / sizeof(T);
    if (config.vector != kVector) return launch<T, kState, 1>(p, config, stream);
    return config.held ? launch_held<T, kState, kVector>(p, config, stream)
                       : launch<T, kState, kVector>(p, config, stream);
  });
}

}  // namespace rf::ema_evict
