// How the CUDA kernel of ema_evict is launched: chosen on the host from the arguments alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/ema_evict/params.h"
#include "csrc/math/fast_divide.h"

namespace rf::ema_evict {

// How the keys and values of a row are cut into units, the work of one lane: a vector, or the two vectors of
// pairs that lie apart. A rotated pair never leaves its unit, so the lanes exchange nothing. In this order,
// so that a warp does one kind of work:
//   keys with temporal pairs, of all heads, up to a multiple of 32 units. Where pairs lie inside of a vector,
//     the places up to there are taken by vectors without pairs, else they stay empty;
//   the other keys; the values.
struct Units {
  int vector;                         // elements
  bool inside;                        // pairs (2i, 2i + 1) inside of a vector; else (x + i, y + i) across two
  int span, span0, span1;             // vectors that a head's pairs take, from where on (across: twice)
  int paired, padded, filled, plain;  // units: with pairs, with their padding, of it taken; other keys
  int values, total;                  // units of the values; of all
  FastDivide paired_a_head, plain_a_head, vectors_a_head;

  Units() = default;
  Units(const Params& p, int vector) : vector(vector) {
    inside = vector > 1 && p.step == 2;
    const int vectors = p.head_dim / vector;
    // One element a vector: a pair is a unit, its places x0 and y0 wherever they are.
    const int pairs_span = ((p.step == 2 ? 2 : 1) * p.temporal_pairs + vector - 1) / vector;
    const int a_head = vector == 1 ? p.temporal_pairs : pairs_span;
    const int others = vectors - (vector == 1 ? 2 * p.temporal_pairs : (inside ? 1 : 2) * pairs_span);
    span = pairs_span;
    span0 = p.x0 / vector;
    span1 = p.y0 / vector;
    paired = p.heads * a_head;
    padded = (paired + 31) / 32 * 32;
    plain = p.heads * others;
    filled = inside ? std::min(padded - paired, plain) : 0;
    values = p.has_values() ? p.heads * vectors : 0;
    total = padded + plain - filled + values;
    paired_a_head = FastDivide(a_head);
    plain_a_head = FastDivide(others);
    vectors_a_head = FastDivide(vectors);
  }
  // First dim of the i-th vector of a head's keys without pairs: they fill the gaps around the spans.
  RF_HD int plain_dim(const Params& p, int i) const {
    if (i >= span0) i += span;
    if (p.step == 1 && i >= span1) i += span;
    return i * vector;
  }
};

struct Config {
  int32_t vector;      // elements of one access: 16 bytes' worth, or 1
  int32_t threads;     // of a CTA
  bool held;           // rows stay in registers (held.h); a CTA then serves kHeldRows tokens, else one
  const char* reason;  // why this `vector`
  Units units;
};

// Sources of a row that one launch serves.
constexpr int kGroup = 32;

// Where rows are held, a lane has one unit of the keys and one of the values: 192 lanes for 12 heads of 128
// in half precision, 640 for 40. Tokens that share what a lane knows of its place: with more, an H200 would
// have too few CTAs for the usual call (780 for 3 frames of 1,560 tokens; two or three fit on an SM at once).
constexpr int kHeldRows = 6;

// Of a CTA: what the registers that a thread needs without a spill leave (96, 128, 168).
RF_HD constexpr int max_threads(EmaState state, bool held) {
  return held ? (state == EmaState::kFloat32 ? 512 : 640) : 384;
}

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
  config.units = Units(p, config.vector);
  const int64_t keys = config.units.padded + config.units.plain - config.units.filled;
  const int64_t lanes = (keys + 31) / 32 * 32;
  const bool one_vector = config.units.inside || config.units.paired == 0;
  config.held =
      vectors && p.sources <= 1 && one_vector && p.k_state != nullptr && lanes <= max_threads(p.state, true);
  config.threads =
      static_cast<int32_t>(config.held ? lanes : std::min<int64_t>(lanes, max_threads(p.state, false)));
  return config;
}

}  // namespace rf::ema_evict
