// Host side of the Hopper forward kernel: tensor maps, schedule, launch. Compiled for sm_90a alone.
#include "csrc/sink_window_attention/sm90/launch.h"

#include "csrc/arch/tensor_map.h"
#include "csrc/common/cuda_call.h"
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

CudaStatus encode(CUtensorMap* map, const arch::TileSource& source) {
  const arch::Encoded done = arch::encode_tensor_map(map, source);
  CudaStatus status = cuda_status(static_cast<cudaError_t>(done.runtime), done.call);
  if (done.driver != 0) status = {0, done.call, done.driver};
  return status;
}

template <class Traits>
CudaStatus launch(const SinkWindowAttentionParams& p, const FwdConfig& config, void* stream) {
  CUtensorMap map_q, map_k, map_v;
  if (const CudaStatus status = encode(&map_q, q_source(p)); !status.ok()) return status;
  if (const CudaStatus status = encode(&map_k, k_source(p, config)); !status.ok()) return status;
  if (const CudaStatus status = encode(&map_v, v_source(p, config)); !status.ok()) return status;
  constexpr auto kKernel = sink_window_attention_fwd_sm90<Traits>;
  constexpr int kSharedBytes = sizeof(typename Traits::Smem);
  int most = 0;
  if (const CudaStatus status = opt_in_shared_memory<kKernel>(most); !status.ok()) return status;
  const FwdKernelParams kernel_params = fwd_kernel_params(p, config);
  const int ranges = kernel_params.schedule.ranges;
  if (p.workspace != nullptr)
    RF_CUDA_TRY(cudaMemsetAsync, p.workspace, 0, workspace_sm90(config, ranges).zeroed(),
                static_cast<cudaStream_t>(stream));
  return launch_kernel("launch of sink_window_attention_fwd_sm90", kKernel, ranges, Traits::kThreads,
                       kSharedBytes, stream, map_q, map_k, map_v, kernel_params);
}

template <template <class, const FwdConfig&> class Traits>
CudaStatus launch_as(const SinkWindowAttentionParams& p, void* stream) {
  const bool half = p.dtype == AttentionDtype::fp16;
  if (p.head_dim == 128)
    return half ? launch<Traits<rf::f16, kFwdConfigHeadDim128>>(p, kFwdConfigHeadDim128, stream)
                : launch<Traits<rf::bf16, kFwdConfigHeadDim128>>(p, kFwdConfigHeadDim128, stream);
  return half ? launch<Traits<rf::f16, kFwdConfigHeadDim64>>(p, kFwdConfigHeadDim64, stream)
              : launch<Traits<rf::bf16, kFwdConfigHeadDim64>>(p, kFwdConfigHeadDim64, stream);
}

}  // namespace

CudaStatus run_sm90(const SinkWindowAttentionParams& p, void* stream) {
  if (unsupported_sm90(p) != nullptr || p.schedule == nullptr ||
      (p.workspace == nullptr && p.schedule->cuts_tiles()))
    return {cudaErrorNotSupported, "sink_window_attention on Hopper"};
  return p.row_kv_tokens == nullptr && p.kv_bias == nullptr ? launch_as<FwdTraitsSm90>(p, stream)
                                                            : launch_as<FwdRowsTraitsSm90>(p, stream);
}

int num_sms_sm90(int device_index) {
  const auto attribute = [&](cudaDeviceAttr attribute) {
    int value = 0;
    const CudaStatus status =
        cuda_status(cudaDeviceGetAttribute(&value, attribute, device_index), "cudaDeviceGetAttribute");
    return status.ok() ? value : 0;
  };
  const bool hopper =
      attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  return hopper ? attribute(cudaDevAttrMultiProcessorCount) : 0;
}

}  // namespace rf::sink_window_attention
