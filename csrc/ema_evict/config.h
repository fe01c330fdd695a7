// How the CUDA kernel of ema_evict is launched: chosen on the host from the arguments alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/ema_evict/params.h"

namespace rf::ema_evict {

struct Config {
  int32_t vector;      // elements of one access: 16 bytes' worth, or 1
  int32_t threads;     // of a CTA; a CTA serves one row
  const char* reason;  // why this `vector`
};

// Sources of a row that one launch serves.
constexpr int kGroup = 32;

// 192 threads are one 16-byte vector each of a 12 x 128 row in half precision.
constexpr int kMaxThreads = 192;

// Whether vectors of N elements can serve this layout: every unit starts at a multiple of N, and the vectors
// that hold the x and the y of the temporal pairs (the last ones perhaps in part) are disjoint. N = 1 always
// can.
template <int N>
RF_HD bool layout_fits(const Params& p) {
  if (p.head_dim % N != 0) return false;
  if (N == 1 || p.temporal_pairs == 0) return true;
  if (p.step == 2) return p.x0 % N == 0;
  const int span = (p.temporal_pairs + N - 1) / N * N;
  return p.x0 % N == 0 && p.y0 % N == 0 && p.x0 + span <= p.y0 && p.y0 + span <= p.head_dim;
}

// Whether 16-byte accesses serve: the layout of a head, every base address, every stride.
inline bool vectors_fit(const Params& p) {
  const int n = 16 / dtype_bytes(p.dtype);
  const bool layout = n == 8 ? layout_fits<8>(p) : n == 4 ? layout_fits<4>(p) : layout_fits<2>(p);
  if (!layout) return false;
  for (const void* address : {p.k_cache, p.v_cache, p.k_state, p.k_state_lo, p.v_state})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  for (int64_t stride : {p.k_stride_b, p.k_stride_t, p.k_stride_h, p.v_stride_b, p.v_stride_t, p.v_stride_h})
    if (stride % n != 0) return false;
  return true;
}

inline Config choose_config(const Params& p) {
  Config config{};
  const bool vectors = vectors_fit(p);
  config.vector = vectors ? 16 / dtype_bytes(p.dtype) : 1;
  config.reason = vectors ? "16-byte vectors"
                          : "scalar: an address, a stride or the head's layout is no multiple of 16 bytes";
  const int64_t units = int64_t{p.heads} * (p.head_dim / config.vector);
  const int64_t steps = (units + kMaxThreads - 1) / kMaxThreads;
  config.threads = static_cast<int32_t>(((units + steps - 1) / steps + 31) / 32 * 32);
  return config;
}

}  // namespace rf::ema_evict
