// Host side of the Hopper forward kernel: tensor maps, schedule, launch. Compiled for sm_90a alone.
#include <cuda_runtime.h>

#include "csrc/arch/tensor_map.h"
#include "csrc/sink_window_attention/sm90/kernel.h"

namespace rf::sink_window_attention {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    sink_window_attention_fwd_sm90(const __grid_constant__ CUtensorMap map_q,
                                   const __grid_constant__ CUtensorMap map_k,
                                   const __grid_constant__ CUtensorMap map_v,
                                   const __grid_constant__ FwdKernelParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  attention_forward_sm90<Traits>(&map_q, &map_k, &map_v, p);
#elif defined(__CUDA_ARCH__)
#error \
    "this file is written for sm_90a: compile it with -gencode=arch=compute_90a,code=sm_90a and nothing else"
#endif
}

namespace {

template <class Traits>
int launch(const SinkWindowAttentionParams& p, const FwdConfig& config, cudaStream_t stream) {
  CUtensorMap map_q, map_k, map_v;
  if (int error = arch::encode_tensor_map(&map_q, q_source(p))) return error;
  if (int error = arch::encode_tensor_map(&map_k, k_source(p, config))) return error;
  if (int error = arch::encode_tensor_map(&map_v, v_source(p, config))) return error;
  if (p.zero_workspace)
    if (const cudaError_t error = cudaMemsetAsync(p.workspace, 0, WorkspaceLayout::kPartials, stream))
      return error;
  const FwdKernelParams kernel_params = fwd_kernel_params(p, config);
  const auto kernel = sink_window_attention_fwd_sm90<Traits>;
  constexpr int kSharedBytes = sizeof(typename Traits::Smem);
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes))
    return error;
  kernel<<<kernel_params.schedule.ranges, Traits::kThreads, kSharedBytes, stream>>>(map_q, map_k, map_v,
                                                                                    kernel_params);
  return cudaGetLastError();
}

}  // namespace
}  // namespace rf::sink_window_attention

// A CUDA error code; cudaErrorNotSupported, with nothing launched, for a call that unsupported_sm90
// (config.h) refuses.
extern "C" int rf_sink_window_attention_fwd_sm90(
    const rf::sink_window_attention::SinkWindowAttentionParams* params, void* cuda_stream) {
  using namespace rf::sink_window_attention;
  const SinkWindowAttentionParams& p = *params;
  if (unsupported_sm90(p) != nullptr || p.num_sms < 1) return cudaErrorNotSupported;
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const bool half = p.dtype == AttentionDtype::fp16;
  if (p.head_dim == 128)
    return half ? launch<FwdTraitsSm90<rf::f16, kFwdConfigHeadDim128>>(p, kFwdConfigHeadDim128, stream)
                : launch<FwdTraitsSm90<rf::bf16, kFwdConfigHeadDim128>>(p, kFwdConfigHeadDim128, stream);
  return half ? launch<FwdTraitsSm90<rf::f16, kFwdConfigHeadDim64>>(p, kFwdConfigHeadDim64, stream)
              : launch<FwdTraitsSm90<rf::bf16, kFwdConfigHeadDim64>>(p, kFwdConfigHeadDim64, stream);
}

// SMs of a device of compute capability 9.0, 0 for any other and where there is no device.
extern "C" int rf_sm90_num_sms(int device_index) {
  int major = 0, minor = 0, sms = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_index) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_index) != cudaSuccess ||
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device_index) != cudaSuccess) {
    cudaGetLastError();  // leaves no error behind for the caller's next check
    return 0;
  }
  return major == 9 && minor == 0 ? sms : 0;
}

extern "C" int rf_stream_is_capturing(void* cuda_stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(cuda_stream), &status);
  return status != cudaStreamCaptureStatusNone;
}
