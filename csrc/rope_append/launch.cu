// CUDA launch of rope_append and rope: one CTA a token, one launch a call, no host synchronisation.
#include "csrc/common/cuda_call.h"
#include "csrc/rope_append/kernel.h"
#include "csrc/rope_append/launch.h"

namespace rf::rope_append {
namespace {

// Of a CTA at most (config.h); 640 in the bounds keeps a thread at 96 registers, which is seven CTAs of 96 an
// SM.
constexpr int kBoundThreads = 640;
constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // beyond this a kernel must opt in

template <typename T, int V, bool kHeld>
__global__ void __launch_bounds__(kBoundThreads, 1)
    rope_append_kernel(const __grid_constant__ Params p, const __grid_constant__ Config config) {
  extern __shared__ __align__(16) unsigned char shared[];
  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    if (batch != blockIdx.y) __syncthreads();  // the token before still reads its angles and sums
    Token<T, V, kHeld> token(p, config, shared, batch, blockIdx.x, threadIdx.x, blockDim.x);
    typename Token<T, V, kHeld>::Registers registers;
    token.read(registers);
    __syncthreads();
    if (p.q.weight != nullptr || p.k.weight != nullptr) {
      token.sum_heads();
      __syncthreads();
      token.scale_heads();
      __syncthreads();
    }
    token.write(registers);
  }
}

template <typename T, int V, bool kHeld>
CudaStatus launch(const Params& p, const Config& config, void* stream) {
  if (config.shared_bytes > kDefaultSharedBytes) {
    int most = 0;  // a row that needs more than this fails in its launch
    const CudaStatus status = opt_in_shared_memory<rope_append_kernel<T, V, kHeld>>(most);
    if (!status.ok()) return status;
  }
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch < 65535 ? p.batch : 65535));
  return launch_kernel("launch of rope_append_kernel", rope_append_kernel<T, V, kHeld>, grid, config.threads,
                       config.shared_bytes, stream, p, config);
}

}  // namespace

CudaStatus run_cuda(const Params& p, const Config& config, void* stream) {
  return with_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    if (config.vector != kVector) return launch<T, 1, false>(p, config, stream);
    return config.held ? launch<T, kVector, true>(p, config, stream)
                       : launch<T, kVector, false>(p, config, stream);
  });
}

}  // namespace rf::rope_append
