// From tensors to the Hopper kernel's parameters; its workspaces.
#include "csrc/sink_window_attention/sm90/op.h"

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "csrc/common/check.h"
#include "csrc/common/launch.h"
#include "csrc/sink_window_attention/sm90/config.h"

extern "C" {
int rf_sink_window_attention_fwd_sm90(const rf::sink_window_attention::SinkWindowAttentionParams* params,
                                      void* stream);
int rf_sm90_num_sms(int device_index);
int rf_stream_is_capturing(void* stream);
}

namespace rf::sink_window_attention {
namespace {

TokenStrides token_strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2)};
}

bool fits_int(const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > std::numeric_limits<int>::max()) return false;
  return true;
}

// A call in the kernel's terms, without outputs and workspace.
struct Request {
  SinkWindowAttentionParams params{};
  std::vector<int32_t> chunk_ends;
};

Request request(const Problem& problem, const Sm90Options& options) {
  const Tensor &q = problem.q, &k = problem.k, &v = problem.v;
  Request r;
  SinkWindowAttentionParams& p = r.params;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_strides = token_strides(q);
  p.k_strides = token_strides(k);
  p.v_strides = token_strides(v);
  const int64_t heads = q.size(2), dim = q.size(3);
  p.out_strides = {q.size(1) * heads * dim, heads * dim, dim};
  p.batch = static_cast<int>(q.size(0));
  p.q_tokens = static_cast<int>(q.size(1));
  p.q_heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(k.size(2));
  p.head_dim = static_cast<int>(dim);
  p.dtype = q.scalar_type() == ScalarType::Half ? AttentionDtype::fp16 : AttentionDtype::bf16;
  p.softmax_scale = static_cast<float>(problem.softmax_scale);
  p.deterministic = options.deterministic;
  if (options.whole_sequence) {
    p.kv_tokens = p.q_tokens;
    for (const QueryChunk& chunk : problem.chunks) r.chunk_ends.push_back(static_cast<int32_t>(chunk.end));
    p.num_chunks = static_cast<int>(r.chunk_ends.size());
    p.num_sink_tokens = static_cast<int>(std::min<int64_t>(options.num_sink_tokens, p.q_tokens));
    p.num_window_tokens =
        static_cast<int>(std::min<int64_t>(options.num_window_tokens.value_or(p.q_tokens), p.q_tokens));
  } else {
    const KeyIntervals& keys = problem.chunks.front().keys;  // [0, kv_tokens), or none
    p.kv_tokens = keys.count == 0 ? 0 : static_cast<int>(keys.end[0]);
  }
  p.chunk_ends = r.chunk_ends.data();
  return r;
}

// One per device and stream, for as long as the process lives: two launches in flight must not share one.
struct Workspace {
  Tensor memory;
  bool zeroed = false;
};

Workspace& workspace_of(const Tensor& q, int num_sms, void* stream) {
  static std::mutex mutex;
  static auto* workspaces =  // never destroyed: the allocator may be gone by then
      new std::map<std::pair<int32_t, void*>, std::unique_ptr<Workspace>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Workspace>& workspace = (*workspaces)[{q.get_device_index(), stream}];
  if (workspace == nullptr) {
    const auto bytes = static_cast<int64_t>(workspace_bytes_sm90(num_sms));
    workspace.reset(new Workspace{torch::stable::new_empty(q, {bytes}, ScalarType::Byte)});
  }
  return *workspace;
}

}  // namespace

const char* refused_by_sm90(const Problem& problem, const Sm90Options& options) {
  const Tensor& q = problem.q;
  if (const char* problem = cuda_problem()) return problem;
  if (rf_sm90_num_sms(q.get_device_index()) == 0) return "the Hopper kernel needs a device of capability 9.0";
  if (q.scalar_type() != ScalarType::BFloat16 && q.scalar_type() != ScalarType::Half)
    return "the Hopper kernel computes in bfloat16 and float16";
  if (!fits_int(q) || !fits_int(problem.k)) return "the Hopper kernel counts in 32 bits";
  SinkWindowAttentionParams p = request(problem, options).params;
  p.chunk_ends = nullptr;
  return unsupported_sm90(p);
}

Attended forward_sm90(const Problem& problem, const Sm90Options& options) {
  const Tensor& q = problem.q;
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = current_stream(device);
  Request r = request(problem, options);
  r.params.num_sms = rf_sm90_num_sms(device);
  const Attended result{torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}),
                        torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float)};
  r.params.out = result.out.mutable_data_ptr();
  r.params.lse = static_cast<float*>(result.lse.mutable_data_ptr());
  Workspace& workspace = workspace_of(q, r.params.num_sms, stream);
  r.params.workspace = workspace.memory.mutable_data_ptr();
  // A launch leaves flags and ticket at zero. While a graph is captured nothing runs: then the zeroing
  // becomes part of the graph, and of every later launch until one outside a capture has done it.
  r.params.zero_workspace = !workspace.zeroed;
  RF_CHECK_CUDA(kOp, rf_sink_window_attention_fwd_sm90(&r.params, stream));
  if (!workspace.zeroed) workspace.zeroed = rf_stream_is_capturing(stream) == 0;
  return result;
}

}  // namespace rf::sink_window_attention
