// What a backend of ema_evict gets: pointers, sizes, strides in elements. No tensor, nothing to check.
#pragma once

#include <cstdint>

#include "csrc/math/dtype.h"
#include "csrc/math/ema.h"

namespace rf::ema_evict {

struct Params {
  Dtype dtype;
  EmaState state;           // kPublished where the cache is float32 or float64
  void* k_cache;            // [B, T, H, D], T = frames * frame_tokens; last stride 1
  void* v_cache;            // [B, T, H, D]; k_cache once more where there are keys alone
  void* k_state;            // [B, S*n, H, D] cache dtype (hi) or float32; null: the slot is the state
  void* k_state_lo;         // [B, S*n, H, D] cache dtype; "compensated" alone
  void* v_state;            // [B, S*n, H, D] lo beside the slot, or float32, or null; as v_cache
  const int32_t* schedule;  // [B or 1, S, 2 + E]: init, count, source slots
  const void* turns;        // [B or 1, S, E + 1, nt, 2]: cosine, sine; the accumulator's dtype
  const double* alpha;      // [S, n] by its strides
  int64_t* skipped;         // [1] or null

  int64_t batch, frames, sink_frames, frame_tokens;
  int32_t heads, head_dim, sources;      // H, D, E
  int32_t temporal_pairs, x0, y0, step;  // pair i: dims x0 + i*step and y0 + i*step
  int64_t k_stride_b, k_stride_t, k_stride_h;
  int64_t v_stride_b, v_stride_t, v_stride_h;
  int64_t schedule_stride_b, turns_stride_b;  // 0 where all samples share one
  int64_t alpha_stride_frame, alpha_stride_token;
  bool skip_nonfinite;

  bool has_values() const { return v_cache != k_cache; }
};

// f.operator()<T, kState>() for the types of a call.
template <typename F>
auto with_state(const Params& p, F&& f) {
  return with_dtype(p.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) == 2) {
      if (p.state == EmaState::kCompensated) return f.template operator()<T, EmaState::kCompensated>();
      if (p.state == EmaState::kFloat32) return f.template operator()<T, EmaState::kFloat32>();
    }
    return f.template operator()<T, EmaState::kPublished>();
  });
}

}  // namespace rf::ema_evict
