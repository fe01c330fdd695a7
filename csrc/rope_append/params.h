// Arguments of rope_append and rope as plain data: pointers, sizes, strides in elements. No torch, no CUDA.
#pragma once

#include "csrc/math/rope.h"

namespace rf::rope_append {

// [B, N or T, heads, D], last dimension contiguous.
struct HeadRows {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};
struct MutableHeadRows {
  void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// One of q and k: what is read, where it goes, and its norm. `rope` is q alone.
struct RopeRows {
  HeadRows in;
  MutableHeadRows out;
  const void* weight;  // [heads * D] (kModel) or [D] (kHead); null: no norm
  int32_t heads;
  bool float_weight;  // weight is float32 although the data is not
};

struct Params {
  Dtype dtype;
  NormScope norm;
  double eps;
  int32_t head_dim;         // D
  int32_t tokens;           // N = frames * frame_tokens
  int64_t batch;            // B
  RopeRows q;               // [B, N, Hq, D] -> [B, N, Hq, D]
  RopeRows k;               // [B, N, Hkv, D] -> cache [B, T, Hkv, D]; heads = 0 in `rope`
  HeadRows v;               // [B, N, Hkv, D]; null: keys alone
  MutableHeadRows v_cache;  // [B, T, Hkv, D]; null with v
  // Frame f of the call goes to cache tokens [slots[f] * n, (slots[f] + 1) * n).
  const int32_t* slots;  // [F] or [B, F]; null in `rope`
  int64_t slots_batch_stride, slots_stride;
  int32_t frame_tokens;  // n
  int64_t cache_tokens;  // T
  RopeAxes axes;
  const void* angles;  // [Bp, R, 2] cos and sin: float64 where the data is, else float32
  int64_t angles_batch_stride;
};

// First cache token of the frame plus the token's place in it; -1 where the slot is outside of the cache.
RF_HD int64_t cache_token(const Params& p, int64_t batch, int32_t token, int32_t frame) {
  const int64_t slot = p.slots[batch * p.slots_batch_stride + frame * p.slots_stride];
  if (slot < 0 || (slot + 1) * p.frame_tokens > p.cache_tokens) return -1;
  return slot * p.frame_tokens + (token - frame * p.frame_tokens);
}
RF_HD int64_t cache_token(const Params& p, int64_t batch, int32_t token) {
  return cache_token(p, batch, token, token / p.frame_tokens);
}

}  // namespace rf::rope_append
