// One variant of the Hopper attention kernel as a library with a C interface (build_variants.py, and
// benchmarks/gpu_suite/tuning.py, which loads it). The edited headers come first on the include path.
#include "csrc/sink_window_attention/sm90/launch.cu"

extern "C" int64_t rf_variant_workspace_bytes(int num_sms) {
  return static_cast<int64_t>(rf::sink_window_attention::workspace_bytes_sm90(num_sms));
}

// strides: {batch, token, head} of q, k, v and out, in elements. sizes: batch, q_tokens, q_heads, kv_heads,
// head_dim, kv_tokens, 1 for float16, number of SMs. The workspace is zeroed when it is allocated.
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
  p.dtype = sizes[6] ? rf::sink_window_attention::AttentionDtype::fp16 : rf::sink_window_attention::AttentionDtype::bf16;
  p.num_sms = sizes[7];
  p.softmax_scale = softmax_scale;
  p.workspace = workspace;
  return rf_sink_window_attention_fwd_sm90(&p, stream);
}
