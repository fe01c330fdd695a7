// CUDA backend: one launch, one thread block a row of kernel.h. Schedule, turns and alpha are read from
// device memory, so a captured graph can be replayed with another plan in the same place.
#include <cuda_runtime.h>

#include <algorithm>

#include "csrc/ema_evict/kernel.h"
#include "csrc/ema_evict/launch.h"

namespace rf::ema_evict {
namespace {

// 192 threads are one 16-byte vector each of a 12 x 128 row in half precision. Three blocks an SM leave up to
// 112 registers a thread; of the limits tried (64, 80, 112), the first under which the half-precision kernels
// spill on no architecture. float32 and float64 need two blocks for that (sm_120).
constexpr int kMaxThreads = 192;
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
    evict_kernel(const __grid_constant__ EmaEvictParams p, int first) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  if (row >= p.batch * p.sink_frames * p.frame_tokens) return;
  evict_row<T, kState, N>(p, row, first,
                          BlockLanes{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)});
}

template <typename T, EmaState kState, int N>
int launch(const EmaEvictParams& p, void* stream) {
  const int64_t rows = p.batch * p.sink_frames * p.frame_tokens;
  const int64_t units = int64_t{p.heads} * (p.head_dim / N);
  const int64_t steps = (units + kMaxThreads - 1) / kMaxThreads;
  const int threads = static_cast<int>(((units + steps - 1) / steps + 31) / 32 * 32);
  // x is as wide as a grid may be; only a cache of more than 2^31 sink tokens needs a second row of blocks.
  const int64_t x = std::min<int64_t>(rows, INT32_MAX);
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>((rows + x - 1) / x));
  // One launch: a second only where more than kGroup frames may go into one sink frame.
  for (int first = 0; first == 0 || first < p.sources; first += kGroup)
    evict_kernel<T, kState, N><<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(p, first);
  return cudaGetLastError();
}

template <typename T, EmaState kState>
int launch(const EmaEvictParams& p, bool vectors, void* stream) {
  return vectors ? launch<T, kState, 16 / sizeof(T)>(p, stream) : launch<T, kState, 1>(p, stream);
}

template <typename T>
int launch_half(const EmaEvictParams& p, EmaState state, bool vectors, void* stream) {
  if (state == EmaState::kCompensated) return launch<T, EmaState::kCompensated>(p, vectors, stream);
  if (state == EmaState::kFloat32) return launch<T, EmaState::kFloat32>(p, vectors, stream);
  return launch<T, EmaState::kPublished>(p, vectors, stream);
}

}  // namespace
}  // namespace rf::ema_evict

using rf::EmaEvictParams;
using rf::EmaState;

extern "C" int rf_ema_evict_bf16(const EmaEvictParams* p, EmaState state, bool vectors, void* stream) {
  return rf::ema_evict::launch_half<rf::bf16>(*p, state, vectors, stream);
}
extern "C" int rf_ema_evict_f16(const EmaEvictParams* p, EmaState state, bool vectors, void* stream) {
  return rf::ema_evict::launch_half<rf::f16>(*p, state, vectors, stream);
}
extern "C" int rf_ema_evict_f32(const EmaEvictParams* p, bool vectors, void* stream) {
  return rf::ema_evict::launch<float, EmaState::kPublished>(*p, vectors, stream);
}
extern "C" int rf_ema_evict_f64(const EmaEvictParams* p, bool vectors, void* stream) {
  return rf::ema_evict::launch<double, EmaState::kPublished>(*p, vectors, stream);
}
