// CUDA launch of rope_append and rope: one CTA a token (or a few), one launch a call, no host
// synchronisation.
#include "csrc/common/cuda_call.h"
#include "csrc/rope_append/held.h"
#include "csrc/rope_append/launch.h"

namespace rf::rope_append {
namespace {

// Of a CTA at most (config.h); 640 in the bounds keeps a thread at 96 registers, which is seven CTAs of 96 an
// SM.
constexpr int kBoundThreads = 640;
constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // beyond this a kernel must opt in

template <typename T, int V>
__global__ void __launch_bounds__(kBoundThreads, 1)
    rope_append_kernel(const __grid_constant__ Params p, const __grid_constant__ Config config) {
  extern __shared__ __align__(16) unsigned char shared[];
  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    if (batch != blockIdx.y) __syncthreads();  // the token before still reads its angles and sums
    Token<T, V> token(p, config, shared, batch, blockIdx.x, threadIdx.x, blockDim.x);
    typename Token<T, V>::Registers registers;
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

// A block of a frame's tokens to a CTA.
template <typename T, int V, bool kUsual>
__global__ void __launch_bounds__(kHeldThreads, 1)
    rope_append_held_kernel(const __grid_constant__ Params p, const __grid_constant__ Config config) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int32_t frame = config.frame_blocks.quotient(blockIdx.x);
  const int32_t begin = kHeldTokens * config.frame_blocks.remainder(blockIdx.x, frame);
  const int32_t frame_tokens = static_cast<int32_t>(config.frame_tokens.divisor);
  const int32_t count = frame_tokens - begin < kHeldTokens ? frame_tokens - begin : kHeldTokens;
  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    if (batch != blockIdx.y) __syncthreads();
    HeldTokens<T, V, kUsual> token(p, config, shared, batch, frame, frame * frame_tokens + begin, threadIdx.x,
                                   blockDim.x);
    RF_NO_UNROLL
    for (int32_t t = 0; t < count; t += kHeldTogether, token.advance()) {
      const int together = count - t < kHeldTogether ? count - t : kHeldTogether;
      token.read(together);
      __syncthreads();
      if (kUsual || p.q.weight != nullptr || p.k.weight != nullptr) {
        token.sum_heads();
        __syncthreads();
        token.scale_heads();
        __syncthreads();
      }
      token.write(together);
    }
  }
}

// `tokens`: CTAs of a sample.
template <auto kKernel>
CudaStatus launch(const Params& p, const Config& config, const char* name, int64_t tokens, void* stream) {
  if (config.shared_bytes > kDefaultSharedBytes) {
    int most = 0;  // a row that needs more than this fails in its launch
    const CudaStatus status = opt_in_shared_memory<kKernel>(most);
    if (!status.ok()) return status;
  }
  const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(p.batch < 65535 ? p.batch : 65535));
  return launch_kernel(name, kKernel, grid, config.threads, config.shared_bytes, stream, p, config);
}

}  // namespace

CudaStatus run_cuda(const Params& p, const Config& config, void* stream) {
  return with_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    if (config.held) {
      const int64_t blocks = int64_t{config.frame_blocks.divisor} * (p.tokens / frame_tokens(p));
      const char* name = "launch of rope_append_held_kernel";
      return config.usual
                 ? launch<rope_append_held_kernel<T, kVector, true>>(p, config, name, blocks, stream)
                 : launch<rope_append_held_kernel<T, kVector, false>>(p, config, name, blocks, stream);
    }
    const char* name = "launch of rope_append_kernel";
    return config.vector == kVector
               ? launch<rope_append_kernel<T, kVector>>(p, config, name, p.tokens, stream)
               : launch<rope_append_kernel<T, 1>>(p, config, name, p.tokens, stream);
  });
}

}  // namespace rf::rope_append
