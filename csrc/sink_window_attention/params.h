// What a launch of the forward kernel is told. Plain data: op.cpp fills it from checked tensors, launchers
// read it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/math/tile_schedule.h"

namespace rf::sink_window_attention {

enum class AttentionDtype : int { bf16, fp16 };

// Strides in elements; the last dimension is contiguous.
struct TokenStrides {
  int64_t batch, token, head;
};

struct SinkWindowAttentionParams {
  const void* q;  // [B, Nq, Hq, D]
  const void* k;  // [B, T, Hkv, D], the first kv_tokens rows are valid: no other is read
  const void* v;  // [B, T, Hkv, D]
  void* out;      // [B, Nq, Hq, D]
  float* lse;     // [B, Hq, Nq], natural logarithm, contiguous
  TokenStrides q_strides, k_strides, v_strides, out_strides;
  int batch, q_tokens, q_heads, kv_heads, head_dim, kv_tokens;
  AttentionDtype dtype;
  float softmax_scale;

  // Whole-sequence mode: chunk c of the queries ends before row chunk_ends[c] (host memory, ascending, the
  // last is q_tokens = kv_tokens) and sees keys [0, min(S, t_end)) and [max(S, t_end - W), t_end). 0 chunks:
  // dense prefix.
  int num_chunks;
  const int32_t* chunk_ends;
  int num_sink_tokens, num_window_tokens;

  // Rows of their own: sample b sees keys [0, row_kv_tokens[b]), clamped to [0, kv_tokens]; device memory,
  // int32 [B]. Null: all see kv_tokens. Not in whole-sequence mode.
  const int32_t* row_kv_tokens;

  // Added to the logits of a key: float [B, kv_tokens] with this stride between samples, device memory, pairs
  // aligned to 8 bytes. Null: nothing is. Not in whole-sequence mode.
  const float* kv_bias;
  int64_t kv_bias_stride;

  // Cuts no query tile over several CTAs: the bits of a result then depend on its own keys alone.
  bool deterministic;

  int num_sms;
  const TileSchedule* schedule;  // of plan_sm90 (sm90/config.h), in host memory
  // Device scratch of this launch alone, of workspace_sm90(...).bytes (sm90/config.h); null when no tile is
  // cut. The launch zeroes what must be zero.
  void* workspace;
};

}  // namespace rf::sink_window_attention
