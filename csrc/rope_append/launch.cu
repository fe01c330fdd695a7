// CUDA launch of rope_append and rope: one CTA a token, one launch a call, no host synchronisation.
#include "csrc/common/cuda_call.h"
#include "csrc/rope_append/kernel.h"
#include "csrc/rope_append/launch.h"

namespace rf::rope_append {
namespace {

constexpr int kMaxThreads = 512;
constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // beyond this a kernel must opt in

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1) rope_append_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t rows = p.batch * p.tokens;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (row != blockIdx.x) __syncthreads();  // the token before still reads its angles and sums
    Token<T, V> token(p, shared, row, threadIdx.x, blockDim.x);
    typename Token<T, V>::Registers registers;
    token.read(registers);
    __syncthreads();
    if (p.q.weight != nullptr || p.k.weight != nullptr) {
      token.sum_heads();
      __syncthreads();
    }
    token.write(registers);
  }
}

template <typename T, int V>
CudaStatus launch(const Params& p, const Config& config, void* stream) {
  if (config.shared_bytes > kDefaultSharedBytes) {
    int most = 0;  // a row that needs more than this fails in its launch
    const CudaStatus status = opt_in_shared_memory<rope_append_kernel<T, V>>(most);
    if (!status.ok()) return status;
  }
  const int64_t rows = p.batch * p.tokens;
  const unsigned grid = static_cast<unsigned>(rows < INT32_MAX ? rows : INT32_MAX);
  return launch_kernel("launch of rope_append_kernel", rope_append_kernel<T, V>, grid, config.threads,
                       config.shared_bytes, stream, p);
}

}  // namespace

CudaStatus run_cuda(const Params& p, const Config& config, void* stream) {
  return with_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    return config.vector == kVector ? launch<T, kVector>(p, config, stream) : launch<T, 1>(p, config, stream);
  });
}

}  // namespace rf::rope_append
