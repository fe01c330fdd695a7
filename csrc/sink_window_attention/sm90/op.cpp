// From tensors to the Hopper kernel's parameters.
#include "csrc/sink_window_attention/sm90/op.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "csrc/common/check.h"
#include "csrc/common/launch.h"
#include "csrc/sink_window_attention/sm90/config.h"
#include "csrc/sink_window_attention/sm90/launch.h"
#include "csrc/sink_window_attention/sm90/schedule_cache.h"

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

// The kernel reads the bias of two keys at once, at even keys: a copy with rows of an even length where that
// would not be aligned.
Tensor in_pairs(const Tensor& bias) {
  const bool aligned = reinterpret_cast<uintptr_t>(bias.const_data_ptr()) % 8 == 0 &&
                       (bias.size(0) == 1 || bias.stride(0) % 2 == 0);
  if (aligned) return bias;
  const int64_t tokens = bias.size(1);
  Tensor even = torch::stable::new_empty(bias, {bias.size(0), tokens + tokens % 2});
  Tensor keys = slice(even, 1, 0, tokens);
  torch::stable::copy_(keys, bias);
  return keys;
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
    if (problem.row_kv_tokens.has_value())
      p.row_kv_tokens = static_cast<const int32_t*>(problem.row_kv_tokens->const_data_ptr());
  }
  if (problem.kv_bias.has_value()) {
    p.kv_bias = static_cast<const float*>(problem.kv_bias->const_data_ptr());
    p.kv_bias_stride = problem.kv_bias->stride(0);
  }
  p.chunk_ends = r.chunk_ends.data();
  return r;
}

}  // namespace

const char* refused_by_sm90(const Problem& problem, const Sm90Options& options) {
  const Tensor& q = problem.q;
  if (const char* problem = cuda_problem()) return problem;
  if (num_sms_sm90(q.get_device_index()) == 0) return "the Hopper kernel needs a device of capability 9.0";
  if (q.scalar_type() != ScalarType::BFloat16 && q.scalar_type() != ScalarType::Half)
    return "the Hopper kernel computes in bfloat16 and float16";
  if (!fits_int(q) || !fits_int(problem.k)) return "the Hopper kernel counts in 32 bits";
  SinkWindowAttentionParams p = request(problem, options).params;
  p.chunk_ends = nullptr;
  return unsupported_sm90(p);
}

Attended forward_sm90(const Problem& checked, const Sm90Options& options) {
  Problem problem = checked;
  if (problem.kv_bias.has_value()) problem.kv_bias = in_pairs(*problem.kv_bias);
  const Tensor& q = problem.q;
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = current_stream(device);
  Request r = request(problem, options);
  r.params.num_sms = num_sms_sm90(device);
  const Attended result{torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}),
                        torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float)};
  r.params.out = result.out.mutable_data_ptr();
  r.params.lse = static_cast<float*>(result.lse.mutable_data_ptr());
  static auto* schedules = new ScheduleCache;  // never destroyed: other threads may outlive main
  const FwdConfig& config = *fwd_config_sm90(r.params.head_dim);
  const std::shared_ptr<const TileSchedule> schedule =
      schedules->get(tile_map(r.params), config.tile_m(), config.tile_n, schedule_options(r.params));
  r.params.schedule = schedule.get();
  // The scratch is an allocation of this call: calls on two streams never share one, and while a graph is
  // captured it comes from the graph's own memory.
  std::optional<Tensor> workspace;
  if (schedule->cuts_tiles()) {
    const auto bytes = static_cast<int64_t>(workspace_sm90(config, schedule->ranges).bytes);
    workspace = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
    r.params.workspace = workspace->mutable_data_ptr();
  }
  check_cuda(kOp, run_sm90(r.params, stream));
  return result;
}

}  // namespace rf::sink_window_attention
