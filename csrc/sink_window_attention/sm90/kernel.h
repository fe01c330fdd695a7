// Attention forward for sm_90a: who does what. One persistent CTA per SM; warpgroup 0 produces, the others
// consume.
#pragma once

#include "csrc/arch/mbarrier.h"
#include "csrc/arch/sync.h"
#include "csrc/arch/tma.h"
#include "csrc/sink_window_attention/sm90/epilogue.h"
#include "csrc/sink_window_attention/sm90/mainloop.h"

namespace rf::sink_window_attention {

template <class Traits>
RF_DEVICE void init_barriers(typename Traits::Smem& smem) {
  using namespace arch;
  for (int w = 0; w < Traits::kWarpgroups; ++w) {
    mbarrier_init(&smem.q_full[w], 1);
    mbarrier_init(&smem.q_empty[w], 4);
  }
  for (int s = 0; s < Traits::kStages; ++s) {
    mbarrier_init(&smem.k_full[s], 1);
    mbarrier_init(&smem.v_full[s], 1);
    mbarrier_init(&smem.k_empty[s], Traits::kConsumerWarps);
    mbarrier_init(&smem.v_empty[s], Traits::kConsumerWarps);
  }
  fence_mbarrier_init();
}

template <class Traits>
RF_DEVICE void consume(typename Traits::Smem& smem, const FwdKernelParams& p, int range, int w) {
  using namespace arch;
  using Mainloop = MainloopFwdSm90<Traits>;
  using Epilogue = EpilogueFwdSm90<Traits>;
  if (w == 0) Mainloop::pass_turn(Traits::kWarpgroups - 1);  // warpgroup 0 begins
  int it = 0;
  uint32_t q_phase = 0;
  Segment segment;
  for (SegmentWalk walk(p.schedule, range); walk.current(p.schedule, segment);
       walk.advance(p.schedule), q_phase ^= 1) {
    typename Mainloop::Fragment fragment;
    Mainloop::mma(smem, p, fwd_work<Traits>(p, segment), w, thread_index() % kWarpgroupThreads, q_phase, it,
                  fragment);

    // A fresh read of the thread index, and the work computed again from the position in the schedule:
    // whatever the epilogue needs and the main loop does not would spill if it were kept over the main loop.
    const int t = thread_index_again() % kWarpgroupThreads, warp = w * 4 + t / kWarpThreads,
              lane = t % kWarpThreads;
    walk.current(p.schedule, segment);
    const FwdWork work = fwd_work<Traits>(p, segment);
    if constexpr (Traits::kRows)
      if (work.count == 0) q_phase ^= 1;  // its queries were not loaded: the phase stays
    if (!segment.owner()) {
      Epilogue::contribute(p, walk.range, warp, lane, fragment);
      continue;
    }
    if (!work.complete)  // the ranges that follow hold the rest; fixed order, hence reproducible to the bit
      for (int x = walk.range + 1; contributes(p.schedule, x, segment.tile); ++x)
        if (has_work(p.schedule, x)) Epilogue::merge(p, x, warp, lane, fragment);
    Epilogue::store(p, work, warp, lane, fragment);
  }
}

template <class Traits>
RF_DEVICE void attention_forward_sm90(const arch::TensorMap* map_q, const arch::TensorMap* map_k,
                                      const arch::TensorMap* map_v, const FwdKernelParams& p) {
  using namespace arch;
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(shared_memory());
  if (thread_index() == 0) {
    tma_prefetch_map(map_q);
    tma_prefetch_map(map_k);
    tma_prefetch_map(map_v);
    init_barriers<Traits>(smem);
    // Where no tile is cut no CTA waits for another, and any order will do.
    smem.ticket = p.ticket == nullptr ? block_index() : take_ticket(p.ticket);
  }
  sync_cta();
  // Ranges are handed out backwards in the order in which CTAs start. A CTA waits only for higher ranges,
  // hence for CTAs that have started before it, and signals before it waits: no deadlock, whatever number of
  // CTAs is resident.
  const int range = p.schedule.ranges - 1 - warp_uniform(static_cast<int>(smem.ticket));
  const int warpgroup = warp_uniform(thread_index() / kWarpgroupThreads);
  if (warpgroup == 0) {
    decrease_registers<Traits::kProducerRegisters>();
    if (warp_uniform(thread_index() / kWarpThreads) == 0 && elect_one())
      MainloopFwdSm90<Traits>::load(smem, map_q, map_k, map_v, p, range);
  } else {
    increase_registers<Traits::kConsumerRegisters>();
    consume<Traits>(smem, p, range, warpgroup - 1);
  }
}

}  // namespace rf::sink_window_attention
