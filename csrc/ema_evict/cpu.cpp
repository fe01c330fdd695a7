// CPU backend: the rows of kernel.h, one lane each, spread over the threads. A row is computed by one thread
// from start to end, so the bits do not depend on how many there are.
#include <algorithm>
#include <atomic>

#include "csrc/common/torch_stable.h"
#include "csrc/ema_evict/kernel.h"
#include "csrc/ema_evict/launch.h"

namespace rf::ema_evict {
namespace {

struct OneLane {
  int lane = 0, lanes = 1;
  bool all(bool mine) const { return mine; }
  void count(int64_t* counter, int n) const {
    std::atomic_ref<int64_t>(*counter).fetch_add(n, std::memory_order_relaxed);
  }
};

template <typename T, EmaState kState, int N>
void rows(const Params& p) {
  const int64_t elements = int64_t{p.heads} * p.head_dim;
  const int64_t grain = std::max<int64_t>(1, 16384 / elements);
  torch::stable::parallel_for(0, p.batch * p.sink_frames * p.frame_tokens, grain,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row)
                                  for (int first = 0; first == 0 || first < p.sources; first += kGroup)
                                    evict_row<T, kState, N>(p, row, first, OneLane{});
                              });
}

template <typename T, EmaState kState>
const char* run(const Params& p) {
  // As long as the layout allows: a unit's fixed cost (branches, the loop over sources) is then shared by
  // more elements. bf16 compensated, one thread, time relative to 64: 3.4 at 8, 1.4 at 32, 1.05 at 128.
  if (layout_fits<64>(p)) {
    rows<T, kState, 64>(p);
    return "vectors of 64";
  }
  if (layout_fits<32>(p)) {
    rows<T, kState, 32>(p);
    return "vectors of 32";
  }
  if (layout_fits<8>(p)) {
    rows<T, kState, 8>(p);
    return "vectors of 8";
  }
  rows<T, kState, 1>(p);
  return "scalar: head_dim or the place of its temporal pairs is no multiple of 8";
}

}  // namespace

const char* run_cpu(const Params& p) {
  return with_state(p, [&]<typename T, EmaState kState>() { return run<T, kState>(p); });
}

}  // namespace rf::ema_evict
