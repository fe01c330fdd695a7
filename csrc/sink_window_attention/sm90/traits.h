// Compile-time facts of the Hopper forward kernel: shared memory, barriers, registers; and its device
// parameters.
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/arch/platform.h"
#include "csrc/arch/vec.h"
#include "csrc/math/tile_schedule.h"
#include "csrc/sink_window_attention/sm90/config.h"

namespace rf::sink_window_attention {

// The turn of consumer warpgroup w to issue its products is barrier kTurn + w; 0 is __syncthreads.
enum NamedBarrierSm90 { kTurn = 1, kRowsCleared = 4 };

template <class Element_, const FwdConfig& kConfig>
struct FwdTraitsSm90 {
  using Element = Element_;
  static constexpr int kHeadDim = kConfig.head_dim, kTileN = kConfig.tile_n, kTileM = kConfig.tile_m();
  static constexpr int kWarpgroups = kConfig.consumer_warpgroups, kThreads = kConfig.threads();
  static constexpr int kProducerRegisters = kConfig.producer_registers;
  static constexpr int kConsumerRegisters = kConfig.consumer_registers;
  static constexpr int kPolynomialBlocks = std::is_same_v<Element, bf16> ? kConfig.polynomial_blocks : 0;
  static constexpr int kPartialFloats = kConfig.partial_floats();
  static constexpr bool kRows = false;

  static constexpr int kStages = 2;  // stage and phase of a tile are bits of its number
  static constexpr int kQBytes = 64 * kHeadDim * 2, kKvBytes = kTileN * kHeadDim * 2;
  // Warps, not warpgroups, hand K and V back: a warp's wgmma wait covers its own rows.
  static constexpr int kConsumerWarps = 4 * kWarpgroups;
  // A turn is passed by one warpgroup and taken by another.
  static constexpr int kTurnThreads = 2 * arch::kWarpgroupThreads;

  // Tiles lie as [head_dim / 64][rows][64], 128-byte swizzled.
  struct Smem {
    alignas(arch::kSwizzleAtomBytes) char q[kWarpgroups]
                                           [kQBytes];  // refilled when ITS warpgroup's last Q K^T is done
    alignas(arch::kSwizzleAtomBytes) char k[kStages][kKvBytes];
    alignas(arch::kSwizzleAtomBytes) char v[kStages][kKvBytes];
    uint64_t q_full[kWarpgroups], q_empty[kWarpgroups];
    uint64_t k_full[kStages], k_empty[kStages];
    uint64_t v_full[kStages], v_empty[kStages];
    uint32_t ticket;
  };

  static_assert(kConfig.stages == kStages);
  static_assert(kPolynomialBlocks >= 0 && kPolynomialBlocks <= 8);
  static_assert(kTileN % 16 == 0 && kHeadDim % 64 == 0 && kWarpgroups >= 2 && kWarpgroups <= 3);
  static_assert(kQBytes % arch::kSwizzleAtomBytes == 0 && kKvBytes % arch::kSwizzleAtomBytes == 0);
  static_assert(sizeof(Smem) <= arch::kMaxSharedBytes);
  static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <=
                    (1 + kWarpgroups) * kConfig.launch_registers(),
                "setmaxnreg.inc would wait for ever");
};

// The same kernel for rows of their own and a bias of keys (FwdKernelParams::row_kv_tokens, kv_bias). An
// instantiation apart: the others keep their machine code.
template <class Element_, const FwdConfig& kConfig>
struct FwdRowsTraitsSm90 : FwdTraitsSm90<Element_, kConfig> {
  static constexpr bool kRows = true;
};

// Travels as one __grid_constant__ argument.
struct FwdKernelParams {
  char* out;
  float* lse;
  float* partials;                                              // [range][warp][partial_floats]
  uint32_t* flags;                                              // [range][warp]
  uint32_t* ticket;                                             // all three null when no tile is cut
  int64_t out_batch_stride, out_token_stride, out_head_stride;  // in elements
  int q_tokens, q_heads, heads_per_kv_head;
  float scale_log2;  // softmax_scale * log2(e)
  TileMap map;
  TileSchedule schedule;
  // Of FwdRowsTraitsSm90 alone. Either may be null.
  const int32_t* row_kv_tokens;  // [batch]
  const float* kv_bias;          // [batch][keys]
  int64_t kv_bias_stride;
  float bias_scale;  // 1 / softmax_scale: scores are what the scale is multiplied with
};
static_assert(sizeof(FwdKernelParams) + 3 * 128 <= 4096, "kernel parameters");

inline FwdKernelParams fwd_kernel_params(const SinkWindowAttentionParams& p, const FwdConfig& config) {
  FwdKernelParams k{};
  k.map = tile_map(p);
  k.schedule = *p.schedule;
  k.out = static_cast<char*>(p.out);
  k.lse = p.lse;
  if (char* workspace = static_cast<char*>(p.workspace)) {
    const Workspace at = workspace_sm90(config, k.schedule.ranges);
    k.partials = reinterpret_cast<float*>(workspace + at.partials);
    k.flags = reinterpret_cast<uint32_t*>(workspace + at.flags);
    k.ticket = reinterpret_cast<uint32_t*>(workspace + at.ticket);
  }
  k.out_batch_stride = p.out_strides.batch;
  k.out_token_stride = p.out_strides.token;
  k.out_head_stride = p.out_strides.head;
  k.q_tokens = p.q_tokens;
  k.q_heads = p.q_heads;
  k.heads_per_kv_head = p.q_heads / p.kv_heads;
  k.scale_log2 = p.softmax_scale * 1.4426950408889634f;
  k.row_kv_tokens = p.row_kv_tokens;
  k.kv_bias = p.kv_bias;
  k.kv_bias_stride = p.kv_bias_stride;
  k.bias_scale = 1.f / p.softmax_scale;
  return k;
}

// One fragment of a query tile, in the coordinates of the tensors.
struct FwdWork {
  int batch, head, kv_head, row, row_end;
  KeyRange keys;
  int first, count;  // units
  bool complete;     // to the tile's last unit
};

// kWholeWarp: all lanes of the warp are here. What comes from memory is then known to be the same in each,
// and with it the main loop's addresses.
template <class Traits, bool kWholeWarp = true>
RF_DEVICE FwdWork fwd_work(const FwdKernelParams& p, const Segment& segment) {
  const TilePlace place = locate(p.map, segment.tile, Traits::kTileM);
  FwdWork w;
  w.batch = place.batch_head / p.q_heads;
  w.head = place.batch_head - w.batch * p.q_heads;
  w.kv_head = w.head / p.heads_per_kv_head;
  w.row = place.row;
  w.row_end = place.row_end;
  w.keys = p.map.keys(place.chunk);
  const int units = w.keys.units(Traits::kTileN);
  w.first = segment.first;
  w.count = min_of(segment.limit, units) - segment.first;
  w.complete = segment.limit >= units;
  if constexpr (Traits::kRows) {
    // The schedule is of the capacity. Units are numbered from the last key tile down: those behind the row's
    // end come first, and are empty. A segment of nothing else has a count of 0.
    int tokens = p.map.kv_tokens;
    if (p.row_kv_tokens != nullptr) tokens = arch::global_load(p.row_kv_tokens + w.batch);
    if constexpr (kWholeWarp) tokens = arch::warp_uniform(tokens);
    w.keys = {{0, min_of(max_of(tokens, 0), p.map.kv_tokens)}, {0, 0}};
    const int empty = units - w.keys.units(Traits::kTileN);
    const int last = max_of(w.first + w.count - empty, 0);
    w.first = max_of(w.first - empty, 0);
    w.count = last - w.first;
  }
  return w;
}

}  // namespace rf::sink_window_attention
