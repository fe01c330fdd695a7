// One variant of the Hopper attention kernel as a library with a C interface (build_variants.py, and
// benchmarks/gpu_suite/tuning.py, which loads it). The edited headers come first on the include path.
#include "csrc/sink_window_attention/sm90/launch.cu"

#include <algorithm>

extern "C" int64_t rf_variant_workspace_bytes(int num_sms) {
  using namespace rf::sink_window_attention;
  return static_cast<int64_t>(std::max(workspace_sm90(kFwdConfigHeadDim128, num_sms).bytes,
                                       workspace_sm90(kFwdConfigHeadDim64, num_sms).bytes));
}

// strides: {batch, token, head} of q, k, v and out, in elements. sizes: batch, q_tokens, q_heads, kv_heads,
// head_dim, kv_tokens, 1 for float16, number of SMs. Returns a cudaError_t or a CUresult.
extern "C" int rf_variant_forward(const void* q, const void* k, const void* v, void* out, float* lse,
                                  const int64_t* strides, const int32_t* sizes, float softmax_scale,
                                  void* workspace, void* stream) {
  const auto at = [&](int i) {
    return rf::sink_window_attention::TokenStrides{strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  rf::sink_window_attention::SinkWindowAttentionParams p{};
  p.q = q;
  p.k = k;
  p.v = v;
  p.out = out;
  p.lse = lse;
  p.q_strides = at(0);
  p.k_strides = at(1);
  p.v_strides = at(2);
  p.out_strides = at(3);
  p.batch = sizes[0];
  p.q_tokens = sizes[1];
  p.q_heads = sizes[2];
  p.kv_heads = sizes[3];
  p.head_dim = sizes[4];
  p.kv_tokens = sizes[5];
  p.dtype = sizes[6] ? rf::sink_window_attention::AttentionDtype::fp16
                     : rf::sink_window_attention::AttentionDtype::bf16;
  p.num_sms = sizes[7];
  p.softmax_scale = softmax_scale;
  if (rf::sink_window_attention::unsupported_sm90(p) != nullptr) return cudaErrorNotSupported;
  const auto& config = *rf::sink_window_attention::fwd_config_sm90(p.head_dim);
  const rf::TileSchedule schedule = rf::sink_window_attention::plan_sm90(p, config);
  p.schedule = &schedule;
  p.workspace = schedule.cuts_tiles() ? workspace : nullptr;
  const rf::CudaStatus status = rf::sink_window_attention::run_sm90(p, stream);
  return status.code != 0 ? status.code : status.driver;
}
