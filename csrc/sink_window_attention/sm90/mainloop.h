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

  static RF_DEVICE void load(Smem& smem, const arch::TensorMap* map_q, const arch::TensorMap* map_k,
                             const arch::TensorMap* map_v, const FwdKernelParams& p, int range) {
    using namespace arch;
    int it = 0;
    uint32_t q_phase = 1;
    Segment segment;
    for (SegmentWalk walk(p.schedule, range); walk.current(p.schedule, segment); walk.advance(p.schedule)) {
      const FwdWork work = fwd_work<Traits>(p, segment);
#pragma unroll 1
      for (int w = 0; w < Traits::kWarpgroups; ++w) {
        mbarrier_wait(&smem.q_empty[w], q_phase);
        mbarrier_arrive_expect(&smem.q_full[w], Traits::kQBytes);
        tma_load<L2Hint::evict_first>(map_q, &smem.q_full[w], smem.q[w],
                                      {{0, work.row + 64 * w, 0, work.head, work.batch}});
      }
      q_phase ^= 1;

      // K of a tile before V of the one before it: the order in which the consumers need them.
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
        if (it == end) break;
        v_row = k_row;
        k_row -= Traits::kTileN;
      }
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
    if (w == 0)
      named_barrier_sync(kTurn, Traits::kTurnThreads);
    else if (Traits::kWarpgroups == 2 || w == 1)
      named_barrier_sync(kTurn + 1, Traits::kTurnThreads);
    else
      named_barrier_sync(kTurn + 2, Traits::kTurnThreads);
  }
  static RF_DEVICE void pass_turn(int w) {
    using namespace arch;
    if (w == Traits::kWarpgroups - 1)
      named_barrier_arrive(kTurn, Traits::kTurnThreads);
    else if (Traits::kWarpgroups == 2 || w == 0)
      named_barrier_arrive(kTurn + 1, Traits::kTurnThreads);
    else
      named_barrier_arrive(kTurn + 2, Traits::kTurnThreads);
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

  // Largest score of each row over the four threads that share it; the factors for what is already
  // accumulated.
  static RF_DEVICE void raise_max(const float (&s)[kScores], SoftmaxRow (&row)[2], float (&factor)[2],
                                  float scale) {
    using namespace arch;
    // Two chains per row: the latency of dependent maxima counts.
    float largest[2][2] = {{s[0], s[1]}, {s[2], s[3]}};
#pragma unroll
    for (int i = 4; i < kScores; ++i) largest[(i >> 1) & 1][i & 1] = max2(largest[(i >> 1) & 1][i & 1], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = max2(largest[r][0], largest[r][1]);
      x = max2(x, shuffle_xor(x, 1));
      x = max2(x, shuffle_xor(x, 2));
      factor[r] = softmax_raise_max(row[r], x, scale);
    }
  }
  static RF_DEVICE void weigh(float (&s)[kScores], SoftmaxRow (&row)[2], float scale) {
    const float reference[2] = {softmax_reference(row[0].max), softmax_reference(row[1].max)};
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = softmax_weight(s[i], scale, reference[(i >> 1) & 1]);
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
  static RF_DEVICE void rescale(float (&o)[kOutputs], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= factor[(i >> 1) & 1];
  }

  // Thread t of consumer warpgroup w: one fragment. `it` counts key tiles since the kernel began.
  static RF_DEVICE void mma(Smem& smem, const FwdKernelParams& p, const FwdWork& work, int w, int t,
                            uint32_t q_phase, int& it, Fragment& f) {
    using namespace arch;
    float s[kScores], factor[2];
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
    mbarrier_wait(&smem.q_full[w], q_phase);
    KeyRun run = key_run(work.keys, 0, work.first, work.count, Traits::kTileN);
    KeyRun next = key_run(work.keys, 1, work.first, work.count, Traits::kTileN);
    if (run.count == 0) run = next, next.count = 0;
#pragma unroll 1
    for (;;) {
      wait_k(it);
      issue_qk(s, q, k0 + stage(it) * Traits::kKvBytes);
      wgmma_wait<0>();
      pin_registers(s);
      release(&smem.k_empty[stage(it)]);
      if (run.valid < Traits::kTileN) mask_columns(s, run.valid, t);
      raise_max(s, f.row, factor, scale);
      weigh(s, f.row, scale);
      to_operand(s, probs);
      rescale(f.o, factor);

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
        // ... this warpgroup does the softmax of this tile.
        raise_max(s, f.row, factor, scale);
        weigh(s, f.row, scale);
        order_before(f.row[0].sum + f.row[1].sum);
        wgmma_wait<0>();
        pin_registers(f.o);
        pin_registers(s);
        release(&smem.v_empty[stage(it)]);
        to_operand(s, probs);
        rescale(f.o, factor);
      }

      // The next query rows may come while this tile finishes.
      if (next.count == 0) release(&smem.q_empty[w]);
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
