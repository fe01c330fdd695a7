// The main loop: one thread of the producer warpgroup loads Q, K and V tiles; the consumer warpgroups turn
// them into un-normalised O, row maxima and row sums.
//
// Per key tile a warpgroup issues S = Q K^T of this tile and O += P V of the tile before back to back, and
// does the softmax of this tile while P V runs; the warpgroups take turns to issue. Key tiles of an interval
// are visited in descending order, so only the first of each can need a mask and the loop has no mask code.
#pragma once

#include "csrc/arch/mbarrier.h"
#include "csrc/arch/sync.h"
#include "csrc/arch/tma.h"
#include "csrc/arch/vec.h"
#include "csrc/arch/wgmma.h"
#include "csrc/math/online_softmax.h"
#include "csrc/sink_window_attention/sm90/traits.h"

namespace rf::sink_window_attention {

template <class Traits>
struct MainloopFwdSm90 {
  using Smem = typename Traits::Smem;
  using Element = typename Traits::Element;
  static constexpr int kScores = Traits::kTileN / 2;     // accumulator elements of S per thread
  static constexpr int kOutputs = Traits::kHeadDim / 2;  // and of O
  static constexpr int kColumnBlocks = 64 * 128;         // bytes of 64 query rows of one 64-wide block

  // Key tile `it` of a CTA, counted since the kernel began: stage it & 1, phase (it >> 1) & 1.
  static RF_DEVICE int stage(int it) { return it & 1; }
  static RF_DEVICE uint32_t phase(int it) { return (it >> 1) & 1; }

  // ---- producer: one thread with few registers, hence one issue site per operand and little state
  static RF_DEVICE void load_kv(const arch::TensorMap* map, uint64_t* full, uint64_t* empty, char* tile,
                                int it, int row, const FwdWork& work) {
    using namespace arch;
    // A barrier that was never used passes for the phase before its first.
    mbarrier_wait(empty, phase(it) ^ 1);
    mbarrier_arrive_expect(full, Traits::kKvBytes);
    tma_load<L2Hint::evict_last>(map, full, tile, {{0, row, 0, work.kv_head, work.batch}});
  }

  static RF_DEVICE void load_q(Smem& smem, const arch::TensorMap* map_q, uint32_t phase,
                               const FwdWork& work) {
    using namespace arch;
#pragma unroll 1
    for (int w = 0; w < Traits::kWarpgroups; ++w) {
      mbarrier_wait(&smem.q_empty[w], phase);
      mbarrier_arrive_expect(&smem.q_full[w], Traits::kQBytes);
      tma_load<L2Hint::evict_first>(map_q, &smem.q_full[w], smem.q[w],
                                    {{0, work.row + 64 * w, 0, work.head, work.batch}});
    }
  }

  static RF_DEVICE void load(Smem& smem, const arch::TensorMap* map_q, const arch::TensorMap* map_k,
                             const arch::TensorMap* map_v, const FwdKernelParams& p, int range) {
    using namespace arch;
    int it = 0;
    uint32_t q_phase = 1;
    Segment segment;
    for (SegmentWalk walk(p.schedule, range); walk.current(p.schedule, segment); walk.advance(p.schedule)) {
      const FwdWork work = fwd_work<Traits, false>(p, segment);
      if constexpr (Traits::kRows)
        if (work.count == 0) continue;
      // K of a tile before V of the one before it: the order in which the consumers need them. The first K
      // does not wait for the buffers of Q.
      const KeyRun high = key_run(work.keys, 0, work.first, work.count, Traits::kTileN);
      const int low_row = key_run(work.keys, 1, work.first, work.count, Traits::kTileN).row;
      const int low_begin = it + high.count, end = it + work.count;
      int k_row = high.row, v_row = -1;
#pragma unroll 1
      for (;; ++it) {
        if (it == low_begin) k_row = low_row;
        if (it < end)
          load_kv(map_k, &smem.k_full[stage(it)], &smem.k_empty[stage(it)], smem.k[stage(it)], it, k_row,
                  work);
        if (v_row >= 0)
          load_kv(map_v, &smem.v_full[stage(it - 1)], &smem.v_empty[stage(it - 1)], smem.v[stage(it - 1)],
                  it - 1, v_row, work);
        else
          load_q(smem, map_q, q_phase, work);
        if (it == end) break;
        v_row = k_row;
        k_row -= Traits::kTileN;
      }
      q_phase ^= 1;
    }
  }

  // ---- consumer
  // What a thread holds of a fragment: O of its two rows, their maxima, and its own share of their sums.
  struct Fragment {
    float o[kOutputs];
    SoftmaxRow row[2];
  };

  // Constant barrier ids (see named_barrier_sync), hence the spelled-out cases.
  static RF_DEVICE void take_turn(int w) {
    using namespace arch;
    if (w == 0) named_barrier_sync(kTurn, Traits::kTurnThreads);
    if (w == 1) named_barrier_sync(kTurn + 1, Traits::kTurnThreads);
    if (Traits::kWarpgroups > 2 && w == 2) named_barrier_sync(kTurn + 2, Traits::kTurnThreads);
  }
  static RF_DEVICE void pass_turn(int w) {
    using namespace arch;
    if (w == Traits::kWarpgroups - 1) named_barrier_arrive(kTurn, Traits::kTurnThreads);
    if (w == 0) named_barrier_arrive(kTurn + 1, Traits::kTurnThreads);
    if (Traits::kWarpgroups > 2 && w == 1) named_barrier_arrive(kTurn + 2, Traits::kTurnThreads);
  }

  // S = Q K^T, 16 of the head dimension at a time: 32 bytes inside a 128-byte row, then the next 64-wide
  // block.
  static RF_DEVICE void issue_qk(float (&s)[kScores], uint32_t q, uint32_t k) {
    using namespace arch;
    const OperandDesc desc_q = operand_k_major(q), desc_k = operand_k_major(k);
    pin_registers(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 16; ++i)
      wgmma_ss<Element>(s, desc_q.at(i / 4 * kColumnBlocks + i % 4 * 32),
                        desc_k.at(i / 4 * Traits::kTileN * 128 + i % 4 * 32), i != 0);
    wgmma_commit();
    pin_registers(s);
  }
  // O += P V, 16 keys at a time.
  static RF_DEVICE void issue_pv(float (&o)[kOutputs], uint32_t (&p)[kScores / 2], uint32_t v) {
    using namespace arch;
    const OperandDesc desc_v = operand_mn_major(v, Traits::kTileN * 128);
    pin_registers(p);
    pin_registers(o);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Traits::kTileN / 16; ++i) wgmma_rs<Element>(o, p + 4 * i, desc_v.at(i * 16 * 128));
    wgmma_commit();
    pin_registers(o);
  }

  // Element i of an accumulator belongs to row (i >> 1) & 1 of the thread, column (i / 4) * 8 + (t % 4) * 2 +
  // (i & 1).
  static RF_DEVICE void mask_columns(float (&s)[kScores], int valid, int t) {
    const int limit = valid - (t % 4) * 2;
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      if ((i / 4) * 8 + (i & 1) >= limit) s[i] = -std::numeric_limits<float>::infinity();
  }

  // A bias of keys, in units of the scores. `bias` points to that of the thread's first column, whose tile is
  // full, or not.
  static RF_DEVICE void add_bias(float (&s)[kScores], const float* bias, float bias_scale) {
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      float b[2];
      arch::global_load(bias + 8 * i, b);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[4 * i + e] += b[e & 1] * bias_scale;
    }
  }
  static RF_DEVICE void add_bias(float (&s)[kScores], const float* bias, float bias_scale, int valid, int t) {
    const int limit = valid - t % 4 * 2;
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        if (8 * i + c < limit) {
          const float b = arch::global_load(bias + 8 * i + c) * bias_scale;
          s[4 * i + c] += b;
          s[4 * i + 2 + c] += b;
        }
  }

  // Rows [valid, kTileN) of a V tile become zeros, for every consumer: the weights of those keys are 0, but 0
  // * NaN is NaN, and they lie in the cache behind the row's end, where anything may be. `thread` counts the
  // consumers' threads.
  static RF_DEVICE void clear_rows(char* tile, int valid, int thread) {
    using namespace arch;
    constexpr int kThreads = Traits::kWarpgroups * kWarpgroupThreads;
    const uint32_t zeros[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = valid * 8 + thread; i < Traits::kTileN * 8; i += kThreads)
#pragma unroll
      for (int block = 0; block < Traits::kHeadDim / 64; ++block)
        shared_store(tile + block * Traits::kTileN * 128 + i * 16, zeros);
    fence_proxy_async_shared();  // the products read through the asynchronous proxy
    named_barrier_sync(kRowsCleared, kThreads);
  }

  // What the softmax of a thread's two rows carries from tile to tile: `base` follows the rows' references.
  struct Softmax {
    float base[2], factor[2];
  };

  // Makes the rows' references fit the scores. False when all rows of the warp keep theirs, as they do in
  // most tiles; else .factor is for what is already accumulated.
  static RF_DEVICE bool raise(const float (&s)[kScores], SoftmaxRow (&row)[2], Softmax& softmax,
                              float scale) {
    using namespace arch;
    // Two chains per row: the latency of dependent maxima counts.
    float chain[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
    for (int i = 4; i < kScores; ++i) chain[(i >> 1) & 1][i & 1] = max2(chain[(i >> 1) & 1][i & 1], s[i]);
    float largest[2] = {max2(chain[0][0], chain[0][1]), max2(chain[1][0], chain[1][1])};
    // The four threads of a row need not exchange their maxima to see that none of them is too large.
    const bool exceeds =
        any_in_warp(softmax_exceeds(row[0], largest[0], scale) | softmax_exceeds(row[1], largest[1], scale));
    if (exceeds) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        largest[r] = max2(largest[r], shuffle_xor(largest[r], 1));
        largest[r] = max2(largest[r], shuffle_xor(largest[r], 2));
        softmax.factor[r] = softmax_raise(row[r], largest[r], scale);
        softmax.base[r] = softmax_base(row[r].reference);
      }
    }
    return exceeds;
  }
  static RF_DEVICE void weigh(float (&s)[kScores], SoftmaxRow (&row)[2], const Softmax& softmax,
                              float scale) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const float base = softmax.base[(i >> 1) & 1];
      s[i] = i / 4 % 8 < Traits::kPolynomialBlocks ? softmax_weight_polynomial(s[i], scale, base)
                                                   : softmax_weight(s[i], scale, base);
    }
    float sum[2][2] = {{row[0].sum + s[0], s[1]}, {row[1].sum + s[2], s[3]}};
#pragma unroll
    for (int i = 4; i < kScores; ++i) sum[(i >> 1) & 1][i & 1] += s[i];
    row[0].sum = sum[0][0] + sum[0][1];
    row[1].sum = sum[1][0] + sum[1][1];
  }
  // Neighbouring elements of S are one register of the A operand of the next product.
  static RF_DEVICE void to_operand(const float (&s)[kScores], uint32_t (&p)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = arch::pack2<Element>(s[2 * i], s[2 * i + 1]);
  }
  static RF_DEVICE void rescale(float (&o)[kOutputs], const Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= softmax.factor[(i >> 1) & 1];
  }

  // Thread t of consumer warpgroup w: one fragment. `it` counts key tiles since the kernel began.
  static RF_DEVICE void mma(Smem& smem, const FwdKernelParams& p, const FwdWork& work, int w, int t,
                            uint32_t q_phase, int& it, Fragment& f) {
    using namespace arch;
    float s[kScores];
    Softmax softmax;
    uint32_t probs[kScores / 2];
    const float scale = p.scale_log2;
    const uint32_t q = shared_address(smem.q[w]), k0 = shared_address(smem.k[0]),
                   v0 = shared_address(smem.v[0]);
    const auto wait_k = [&](int i) { mbarrier_wait(&smem.k_full[stage(i)], phase(i)); };
    const auto wait_v = [&](int i) { mbarrier_wait(&smem.v_full[stage(i)], phase(i)); };
    const auto release = [&](uint64_t* empty) {
      if (elect_one()) mbarrier_arrive(empty);
    };

#pragma unroll
    for (int i = 0; i < kOutputs; ++i) f.o[i] = 0.f;
    f.row[0] = f.row[1] = softmax_empty();
    if constexpr (Traits::kRows)
      if (work.count == 0) return;
    mbarrier_wait(&smem.q_full[w], q_phase);
    KeyRun run = key_run(work.keys, 0, work.first, work.count, Traits::kTileN);
    KeyRun next = key_run(work.keys, 1, work.first, work.count, Traits::kTileN);
    if (run.count == 0) run = next, next.count = 0;
    const float* bias = nullptr;  // of this thread's first key of the tile
    if constexpr (Traits::kRows) bias = p.kv_bias + work.batch * p.kv_bias_stride + run.row + t % 4 * 2;
#pragma unroll 1
    for (;;) {
      wait_k(it);
      issue_qk(s, q, k0 + stage(it) * Traits::kKvBytes);
      wgmma_wait<0>();
      pin_registers(s);
      release(&smem.k_empty[stage(it)]);
      if (next.count == 0 && run.count == 1) release(&smem.q_empty[w]);
      if constexpr (Traits::kRows)
        if (p.kv_bias != nullptr) add_bias(s, bias, p.bias_scale, run.valid, t);
      if (run.valid < Traits::kTileN) mask_columns(s, run.valid, t);
      bool exceeds = raise(s, f.row, softmax, scale);
      weigh(s, f.row, softmax, scale);
      to_operand(s, probs);
      if (exceeds) rescale(f.o, softmax);
      if constexpr (Traits::kRows)
        if (run.valid < Traits::kTileN) {
          wait_v(it);
          clear_rows(smem.v[stage(it)], run.valid, w * kWarpgroupThreads + t);
        }

      const int last =
          next.count == 0 ? 1 : 0;  // of n, at the last Q K^T of the query tile; 0: not in this interval
#pragma unroll 1
      for (int n = run.count - 1; n > 0; --n, ++it) {
        wait_k(it + 1);
        take_turn(w);
        // S of this tile and P V of the one before run while ...
        issue_qk(s, q, k0 + stage(it + 1) * Traits::kKvBytes);
        wait_v(it);
        issue_pv(f.o, probs, v0 + stage(it) * Traits::kKvBytes);
        pass_turn(w);
        wgmma_wait<1>();
        pin_registers(s);
        release(&smem.k_empty[stage(it + 1)]);
        if (n == last) release(&smem.q_empty[w]);  // the next query rows may come while this tile finishes
        // ... this warpgroup does the softmax of this tile.
        if constexpr (Traits::kRows)
          if (p.kv_bias != nullptr) add_bias(s, bias -= Traits::kTileN, p.bias_scale);
        exceeds = raise(s, f.row, softmax, scale);
        weigh(s, f.row, softmax, scale);
        order_before(f.row[0].sum + f.row[1].sum);
        wgmma_wait<0>();
        pin_registers(f.o);
        pin_registers(s);
        release(&smem.v_empty[stage(it)]);
        to_operand(s, probs);
        if (exceeds) rescale(f.o, softmax);
      }

      wait_v(it);
      issue_pv(f.o, probs, v0 + stage(it) * Traits::kKvBytes);
      wgmma_wait<0>();
      pin_registers(f.o);
      release(&smem.v_empty[stage(it)]);
      ++it;
      if (next.count == 0) break;
      run = next;
      next.count = 0;
    }
    // Until here each of the four threads of a row has summed its own columns.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      f.row[r].sum += shuffle_xor(f.row[r].sum, 1);
      f.row[r].sum += shuffle_xor(f.row[r].sum, 2);
    }
  }
};

}  // namespace rf::sink_window_attention
