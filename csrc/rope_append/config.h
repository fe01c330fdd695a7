// How the CUDA kernel of rope_append is launched: chosen on the host from the arguments alone, and printable
// (`rf_kernels.last_dispatch().reason`).
#pragma once

#include "csrc/rope_append/params.h"

namespace rf::rope_append {

struct Config {
  int32_t vector;        // elements of one access: 16 bytes' worth, or 1
  int32_t threads;       // of a CTA
  int64_t shared_bytes;  // angles of the token, sums of squares, scales
  bool held;             // a lane for every unit and every pair (held.h): a CTA serves kHeldTokens, else one
  bool usual;            // held, and norm, rotation and layout are those of Wan: a way without questions
  const char* reason;    // why this `vector`
  FastDivide units;      // of a head
  FastDivide frame_tokens;
  FastDivide frame_blocks;  // of kHeldTokens in a frame
};

// Tokens of a frame that share what a lane knows of its place. The usual call, 4,680 tokens, then has 780
// CTAs of 96 lanes: six an SM.
constexpr int32_t kHeldTokens = 6;
constexpr int32_t kHeldTogether = 2;  // of them at once
// Lanes that may hold tokens, at most: what the registers that a lane needs without a spill leave (168).
constexpr int32_t kHeldThreads = 384;

// A unit is 2 * vector dims of a head: `vector` pairs, or as many unrotated dims (the last unit may hold
// half).
RF_HD int32_t units_per_head(const Params& p, int32_t vector) {
  const int32_t tail = p.head_dim - 2 * p.axes.pairs;
  return p.axes.pairs / vector + (tail + 2 * vector - 1) / (2 * vector);
}

// Why rows of this shape cannot be read in packs of `vector` elements; null if they can.
inline const char* vector_obstacle(const Params& p, int32_t vector) {
  if (p.head_dim % vector != 0) return "scalar accesses: the head dim is no multiple of 16 bytes";
  if (p.axes.pairs % vector != 0)
    return "scalar accesses: the number of pairs is no multiple of a 16-byte access";
  if (p.axes.layout == RopeLayout::kAxisHalf)
    for (int32_t a = 0; a < p.axes.count; ++a)
      if (p.axes.axis[a].pairs % vector != 0)
        return "scalar accesses: an axis_half axis whose pairs are no multiple of a 16-byte access";
  return nullptr;
}

inline bool aligned_rows(const void* data, int64_t batch, int64_t token, int64_t head, int32_t vector) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % vector == 0 && token % vector == 0 &&
         head % vector == 0;
}
template <typename Rows>
bool aligned_rows(const Rows& r, int32_t vector) {
  return r.data == nullptr || aligned_rows(r.data, r.batch_stride, r.token_stride, r.head_stride, vector);
}
inline bool aligned(const Params& p, int32_t vector) {
  const bool weights =
      reinterpret_cast<uintptr_t>(p.q.weight) % 16 == 0 && reinterpret_cast<uintptr_t>(p.k.weight) % 16 == 0;
  return weights && aligned_rows(p.q.in, vector) && aligned_rows(p.q.out, vector) &&
         aligned_rows(p.k.in, vector) && aligned_rows(p.k.out, vector) && aligned_rows(p.v, vector) &&
         aligned_rows(p.v_cache, vector);
}

// `rope` has no frames: all tokens are one.
inline int32_t frame_tokens(const Params& p) {
  return p.k.heads > 0 ? p.frame_tokens : p.tokens;
}

inline Config choose_config(const Params& p) {
  Config config{};
  config.vector = 16 / dtype_bytes(p.dtype);
  config.reason = vector_obstacle(p, config.vector);
  if (config.reason == nullptr && !aligned(p, config.vector))
    config.reason = "scalar accesses: an address or a stride is no multiple of 16 bytes";
  if (config.reason != nullptr)
    config.vector = 1;
  else
    config.reason = "16-byte accesses";

  const int32_t heads = p.q.heads > p.k.heads ? p.q.heads : p.k.heads;
  const int64_t units = static_cast<int64_t>(heads) * units_per_head(p, config.vector);
  // A lane per unit, so that a row is read in one go and stays in registers (96 lanes for 12 heads of 128 in
  // half precision); 512 is where four CTAs still share an SM. Wider rows take several passes.
  const int64_t lanes = units < 512 ? units : 512;
  const bool whole_units = (p.head_dim - 2 * p.axes.pairs) % (2 * config.vector) == 0;
  const bool weights_like_data = p.dtype == Dtype::kFloat32 || !(p.q.float_weight || p.k.float_weight);
  config.held = config.vector > 1 && units <= kHeldThreads && p.axes.pairs <= kHeldThreads && whole_units &&
                weights_like_data;
  config.usual = config.held && p.norm == NormScope::kModel && p.q.weight != nullptr &&
                 p.k.weight != nullptr && p.q.heads == p.k.heads && p.axes.layout == RopeLayout::kAdjacent &&
                 2 * p.axes.pairs == p.head_dim && frame_tokens(p) % kHeldTogether == 0 &&
                 p.v.data != nullptr;
  const int64_t held_lanes = units > p.axes.pairs ? units : p.axes.pairs;
  config.threads = static_cast<int32_t>(((config.held ? held_lanes : lanes) + 31) / 32 * 32);

  const int64_t accumulator = p.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t row_heads = static_cast<int64_t>(p.q.heads) + p.k.heads;
  const int64_t sums =
      p.q.weight != nullptr || p.k.weight != nullptr ? row_heads * (units_per_head(p, config.vector) + 2) : 0;
  const int64_t pairs = 2 * static_cast<int64_t>(p.axes.pairs);
  config.shared_bytes = accumulator * (config.held ? kHeldTogether * (2 * pairs + sums) : pairs + sums);
  config.units = units_per_head(p, config.vector);
  config.frame_tokens = frame_tokens(p);
  config.frame_blocks = (frame_tokens(p) + kHeldTokens - 1) / kHeldTokens;
  return config;
}

}  // namespace rf::rope_append
