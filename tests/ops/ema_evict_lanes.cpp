// The body of ema_evict's CUDA kernel as host code: each row by a chosen number of lanes in a chosen order.
// Built and called by tests/ops/test_ema_evict_kernel.py.
#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "csrc/ema_evict/held.h"

namespace rf::ema_evict {
namespace {

// The vote of a block by replay: a lane that asks for a vote not yet counted leaves its own and stops; when
// all lanes have stopped there, it is counted and all begin again. A lane that wrote before a vote would
// write twice, and the average would show it.
struct Ballot {
  std::vector<bool> counted;
  bool all = true;
  int voters = 0;
};
struct Stopped {};

struct HostLanes {
  int lane, lanes;
  Ballot& ballot;
  size_t& votes;  // of this lane in this replay

  bool all(bool mine) const {
    if (votes < ballot.counted.size()) return ballot.counted[votes++];
    ballot.all &= mine;
    ++ballot.voters;
    throw Stopped{};
  }
  void count(int64_t* counter, int n) const {
    if (lane == 0) *counter += n;
  }
};

// False if some lanes came to a vote and others did not: on the GPU, a deadlock.
template <typename T, EmaState kState, int N>
bool run_row(const Params& p, const Units& units, int64_t row, int first, const std::vector<int>& order) {
  const int64_t t = row % p.frame_tokens, j = row / p.frame_tokens % p.sink_frames;
  const int64_t b = row / p.frame_tokens / p.sink_frames;
  const int lanes = static_cast<int>(order.size());
  Ballot ballot;
  for (;;) {
    const int64_t moved_before = moved_bytes;
    ballot.all = true;
    ballot.voters = 0;
    for (const int lane : order) {
      size_t votes = 0;
      try {
        evict_row<T, kState, N>(p, units, b, j, t, first, HostLanes{lane, lanes, ballot, votes});
      } catch (const Stopped&) {
      }
    }
    if (ballot.voters == 0) return true;
    if (ballot.voters != lanes) return false;
    ballot.counted.push_back(ballot.all);
    moved_bytes = moved_before;  // all of it is replayed
  }
}

// Rows in registers, as evict_held_kernel of launch.cu goes through them: each step by all lanes, in order.
template <typename T, EmaState kState, int N>
void run_held(const Params& p, const Units& units, int64_t b, int64_t j, int64_t begin,
              const std::vector<int>& order) {
  std::vector<HeldLane<T, kState, N>> lanes;
  for (const int lane : order) lanes.emplace_back(p, units, b, j, begin, lane);
  const int64_t end = std::min(begin + kHeldRows, p.frame_tokens);
  for (int64_t t = begin; t < end; ++t) {
    const bool usual = lanes[0].usual();
    bool finite = true;
    for (auto& lane : lanes) {
      if (usual)
        lane.template read<true>();
      else
        lane.template read<false>();
      if (lane.votes()) finite &= lane.finite();
    }
    for (auto& lane : lanes) {
      if (usual && finite)
        lane.template write<true>(true);
      else
        lane.template write<false>(lane.fuses() && finite);
      lane.advance();
    }
    if (!finite && p.skipped != nullptr) ++*p.skipped;
  }
}

template <typename T, EmaState kState, int N>
bool run_held(const Params& p, const Units& units, const std::vector<int>& order) {
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t j = 0; j < p.sink_frames; ++j)
      for (int64_t t = 0; t < p.frame_tokens; t += kHeldRows)
        run_held<T, kState, N>(p, units, b, j, t, order);
  return true;
}

template <typename T, EmaState kState, int N>
bool run(const Params& p, const Units& units, const std::vector<int>& order) {
  bool together = true;
  for (int first = 0; first == 0 || first < p.sources; first += kGroup)
    for (int64_t row = 0; row < p.batch * p.sink_frames * p.frame_tokens; ++row)
      together &= run_row<T, kState, N>(p, units, row, first, order);
  return together;
}

// `lanes`: 0 for the chosen number; with fewer than that a row is not held.
int run(const Params& p, int lanes, bool reversed) {
  const Config config = choose_config(p);
  std::vector<int> order(static_cast<size_t>(lanes > 0 ? lanes : config.threads));
  std::iota(order.begin(), order.end(), 0);
  if (reversed) std::reverse(order.begin(), order.end());
  const bool held = config.held && static_cast<int>(order.size()) >= config.threads;
  return with_state(p, [&]<typename T, EmaState kState>() {
    constexpr int kVector = 16 / sizeof(T);
    bool together = false;
    if (config.vector != kVector)
      together = run<T, kState, 1>(p, config.units, order);
    else
      together = held ? run_held<T, kState, kVector>(p, config.units, order)
                      : run<T, kState, kVector>(p, config.units, order);
    return !together ? -1 : held ? 2 * config.vector : config.vector;
  });
}

}  // namespace
}  // namespace rf::ema_evict

// data: k_cache, v_cache, k_state, k_state_lo, v_state, schedule, turns, alpha, skipped.
// sizes: dtype, state, then the integers of Params in their order.
// Returns the elements of one access (twice that where a row is held in registers), or -1 if the lanes of a
// row did not vote together.
extern "C" int ema_evict_lanes(const int64_t* sizes, void* const* data, int lanes, int reversed) {
  using namespace rf;
  ema_evict::Params p{};
  p.k_cache = data[0];
  p.v_cache = data[1];
  p.k_state = data[2];
  p.k_state_lo = data[3];
  p.v_state = data[4];
  p.schedule = static_cast<const int32_t*>(data[5]);
  p.turns = data[6];
  p.alpha = static_cast<const double*>(data[7]);
  p.skipped = static_cast<int64_t*>(data[8]);
  p.dtype = static_cast<Dtype>(*sizes++);
  p.state = static_cast<EmaState>(*sizes++);
  for (int64_t* n : {&p.batch, &p.frames, &p.sink_frames, &p.frame_tokens}) *n = *sizes++;
  for (int32_t* n : {&p.heads, &p.head_dim, &p.sources, &p.temporal_pairs, &p.x0, &p.y0, &p.step})
    *n = static_cast<int32_t>(*sizes++);
  for (int64_t* n : {&p.k_stride_b, &p.k_stride_t, &p.k_stride_h, &p.v_stride_b, &p.v_stride_t, &p.v_stride_h,
                     &p.schedule_stride_b, &p.turns_stride_b, &p.alpha_stride_frame, &p.alpha_stride_token})
    *n = *sizes++;
  p.skip_nonfinite = *sizes != 0;

  return ema_evict::run(p, lanes, reversed != 0);
}

// Bytes that vector accesses have moved since the last question.
extern "C" int64_t ema_evict_moved_bytes() {
  return std::exchange(rf::moved_bytes, 0);
}
