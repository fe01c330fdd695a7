// Which tile sizes the Hopper forward kernel uses, and whether it takes a call at all.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "csrc/arch/tile.h"
#include "csrc/math/tile_schedule.h"
#include "csrc/sink_window_attention/params.h"

namespace rf::sink_window_attention {

struct FwdConfig {
  int head_dim;
  int consumer_warpgroups;  // 64 query rows each
  int tile_n;               // keys per tile
  int stages;               // K tiles and V tiles in shared memory
  int producer_registers, consumer_registers;
  // Of every 8 blocks of 8 keys, the exponentials of so many are computed on the FMA units instead of the
  // special function unit (bfloat16 alone: float16 would show the difference).
  int polynomial_blocks;

  constexpr int tile_m() const { return 64 * consumer_warpgroups; }
  constexpr int threads() const { return 128 * (1 + consumer_warpgroups); }
  // What every thread has at launch: setmaxnreg moves it, and waits for ever for what nobody gave away.
  constexpr int launch_registers() const { return 65536 / threads() / 8 * 8; }
  // Partial result of one warp: O fragment and {max0, max1, sum0, sum1} of each thread.
  constexpr int partial_floats() const { return 32 * (head_dim / 2 + 4); }
};

// 128 x 176: S 88, P 44 and O 64 registers leave 36 of 232; two stages of K and V fill 208 KiB. 14,040 keys
// are 79.8 tiles. 192 keys fit too and waste more of 14,040; 160 and 128 cost more instructions per key.
inline constexpr FwdConfig kFwdConfigHeadDim128{128, 2, 176, 2, 40, 232, 0};
// Half the matrix work per key at the same number of exponentials: three consumer warpgroups cover the
// exponentials of each other where two do not. The special function unit is as busy as the tensor cores:
// polynomial_blocks is for that, and stays 0 until a GPU has measured it.
inline constexpr FwdConfig kFwdConfigHeadDim64{64, 3, 128, 2, 32, 160, 0};

constexpr const FwdConfig* fwd_config_sm90(int head_dim) {
  if (head_dim == 128) return &kFwdConfigHeadDim128;
  if (head_dim == 64) return &kFwdConfigHeadDim64;
  return nullptr;
}

// Device scratch of a launch that cuts tiles: the ticket counter, one flag per warp that hands a partial
// result over, the partial results. Ticket and flags must be zero when the kernel starts.
struct Workspace {
  size_t ticket, flags, partials, bytes;  // offsets, and the size of all
  constexpr size_t zeroed() const { return partials; }
};
constexpr Workspace workspace_sm90(const FwdConfig& config, int ranges) {
  constexpr size_t kLine = 128;
  const size_t warps = size_t{4} * config.consumer_warpgroups * ranges;
  const size_t partials = kLine + (warps * sizeof(uint32_t) + kLine - 1) / kLine * kLine;
  return {0, kLine, partials, partials + warps * config.partial_floats() * sizeof(float)};
}

namespace detail {
inline arch::TileSource tile_source(const SinkWindowAttentionParams& p, const void* data,
                                    const TokenStrides& s, int rows, int heads, int box_rows) {
  return {data,    p.batch, rows,   heads,    p.head_dim,
          s.batch, s.token, s.head, box_rows, p.dtype == AttentionDtype::fp16};
}
}  // namespace detail
inline arch::TileSource q_source(const SinkWindowAttentionParams& p) {  // one warpgroup's rows at a time
  return detail::tile_source(p, p.q, p.q_strides, p.q_tokens, p.q_heads, 64);
}
// Rows from kv_tokens on arrive as zeros. V needs that as K does: the weight of such a row is 0, but 0 * NaN
// is NaN.
inline arch::TileSource k_source(const SinkWindowAttentionParams& p, const FwdConfig& c) {
  return detail::tile_source(p, p.k, p.k_strides, p.kv_tokens, p.kv_heads, c.tile_n);
}
inline arch::TileSource v_source(const SinkWindowAttentionParams& p, const FwdConfig& c) {
  return detail::tile_source(p, p.v, p.v_strides, p.kv_tokens, p.kv_heads, c.tile_n);
}

// nullptr when the kernel takes the call, else the reason why the portable path must.
inline const char* unsupported_sm90(const SinkWindowAttentionParams& p) {
  const FwdConfig* config = fwd_config_sm90(p.head_dim);
  if (config == nullptr) return "the Hopper kernel has head dims 64 and 128";
  if (p.q_tokens < 1 || p.kv_tokens < 1) return "the Hopper kernel needs a query and a key";
  if (p.kv_heads < 1 || p.q_heads % p.kv_heads != 0)
    return "the Hopper kernel needs query heads that are a multiple of the key heads";
  if (p.num_chunks > TileMap::kMaxChunks) return "the Hopper kernel takes at most 128 chunks";
  if (p.num_chunks > 0 && p.num_sink_tokens + p.num_window_tokens < 1)
    return "the Hopper kernel needs a sink or a window";
  if (!(p.softmax_scale > 0.f) || std::isinf(p.softmax_scale))
    return "the Hopper kernel needs a softmax_scale that is positive and finite";
  const double tiles =
      static_cast<double>(p.batch) * p.q_heads * (p.q_tokens / config->tile_m() + 1.0 + p.num_chunks);
  if (tiles >= 1e9) return "the Hopper kernel takes at most 10^9 query tiles";
  for (const arch::TileSource& s : {q_source(p), k_source(p, *config), v_source(p, *config)})
    if (const char* problem = arch::tile_source_problem(s)) return problem;
  const TokenStrides& o = p.out_strides;
  if (reinterpret_cast<uintptr_t>(p.out) % 16 != 0 || (o.batch | o.token | o.head) % 8 != 0)
    return "the Hopper kernel needs output rows that are 16-byte aligned";
  return nullptr;
}

inline TileMap tile_map(const SinkWindowAttentionParams& p) {
  TileMap map = TileMap::dense(p.batch * p.q_heads, p.q_tokens, p.kv_tokens);
  if (p.num_chunks > 0) {
    map.num_sink_tokens = p.num_sink_tokens;
    map.num_window_tokens = p.num_window_tokens;
    map.chunks = p.num_chunks;
    for (int c = 0; c < p.num_chunks; ++c) map.chunk_end[c] = p.chunk_ends[c];
  }
  return map;
}

inline ScheduleOptions schedule_options(const SinkWindowAttentionParams& p) {
  return {.ctas = p.num_sms, .deterministic = p.deterministic};
}
inline TileSchedule plan_sm90(const SinkWindowAttentionParams& p, const FwdConfig& config) {
  return plan_schedule(tile_map(p), config.tile_m(), config.tile_n, schedule_options(p));
}

}  // namespace rf::sink_window_attention
