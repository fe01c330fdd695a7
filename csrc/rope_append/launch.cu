// CUDA launch of rope_append and rope: one CTA a token, one launch a call, no host synchronisation.
#include <cuda_runtime.h>

#include "csrc/rope_append/backends.h"
#include "csrc/rope_append/kernel.h"

namespace rf {
namespace {

constexpr int kMaxThreads = 512;
constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // beyond this a kernel must opt in

template <typename T, int V>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rope_append_kernel(const __grid_constant__ RopeAppendParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t rows = p.batch * p.tokens;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    if (row != blockIdx.x) __syncthreads();  // the token before still reads its angles and sums
    RopeAppendToken<T, V> token(p, shared, row, threadIdx.x, blockDim.x);
    typename RopeAppendToken<T, V>::Registers registers;
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
cudaError_t launch(const RopeAppendParams& p, const RopeAppendConfig& config, cudaStream_t stream) {
  auto* kernel = rope_append_kernel<T, V>;
  if (config.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const int64_t rows = p.batch * p.tokens;
  const unsigned grid = static_cast<unsigned>(rows < INT32_MAX ? rows : INT32_MAX);
  kernel<<<grid, config.threads, config.shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_dtype(const RopeAppendParams& p, const RopeAppendConfig& config, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  return config.vector == kVector ? launch<T, kVector>(p, config, stream) : launch<T, 1>(p, config, stream);
}

}  // namespace
}  // namespace rf

extern "C" int rf_rope_append_launch(const rf::RopeAppendParams* params, const rf::RopeAppendConfig* config,
                                     void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (params->dtype) {
    case rf::RopeDtype::kBFloat16:
      return rf::launch_dtype<rf::bf16>(*params, *config, s);
    case rf::RopeDtype::kFloat16:
      return rf::launch_dtype<rf::f16>(*params, *config, s);
    case rf::RopeDtype::kFloat32:
      return rf::launch_dtype<float>(*params, *config, s);
    case rf::RopeDtype::kFloat64:
      return rf::launch_dtype<double>(*params, *config, s);
  }
  return cudaErrorInvalidValue;
}
