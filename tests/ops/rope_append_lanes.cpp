// The body of rope_append's CUDA kernel as host code: for each token, every phase for every lane, in a chosen
// order of lanes, on shared memory that begins as NaN and ends in a guard. Built and called by
// tests/ops/test_rope_append_kernel.py.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "csrc/rope_append/held.h"

namespace rf::rope_append {
namespace {

constexpr unsigned char kGuard = 0xA5;

constexpr size_t kGuardBytes = 64;

struct Shared {
  explicit Shared(int64_t bytes)
      : bytes(bytes), data(static_cast<unsigned char*>(std::aligned_alloc(64, (bytes / 64 + 2) * 64))) {}
  ~Shared() { std::free(data); }
  void reset() {
    std::fill_n(data, bytes, 0xFF);  // NaN, float or double
    std::fill_n(data + bytes, kGuardBytes, kGuard);
  }
  bool whole() const {
    return std::all_of(data + bytes, data + bytes + kGuardBytes, [](unsigned char c) { return c == kGuard; });
  }
  int64_t bytes;
  unsigned char* data;
};

template <typename T, int V>
bool run(const Params& p, const Config& config, const std::vector<int32_t>& order) {
  std::vector<typename Token<T, V>::Registers> registers(order.size());
  Shared shared(config.shared_bytes);
  bool whole = true;
  for (int64_t row = 0; row < p.batch * p.tokens; ++row) {
    const auto token = [&](int32_t lane) {
      return Token<T, V>(p, config, shared.data, row / p.tokens, static_cast<int32_t>(row % p.tokens), lane,
                         static_cast<int32_t>(order.size()));
    };
    shared.reset();
    for (const int32_t lane : order) token(lane).read(registers[lane]);
    if (p.q.weight != nullptr || p.k.weight != nullptr) {
      for (const int32_t lane : order) token(lane).sum_heads();
      for (const int32_t lane : order) token(lane).scale_heads();
    }
    for (const int32_t lane : order) token(lane).write(registers[lane]);
    whole &= shared.whole();
  }
  return whole;
}

// As rope_append_held_kernel of launch.cu, but for one thing: what a group of tokens leaves in shared memory
// is there for the next, angles included, as on the GPU.
template <typename T, int V, bool kUsual>
bool run_held(const Params& p, const Config& config, const std::vector<int32_t>& order) {
  Shared shared(config.shared_bytes);
  bool whole = true;
  const int32_t n = frame_tokens(p);
  for (int64_t batch = 0; batch < p.batch; ++batch)
    for (int32_t first = 0; first < p.tokens; first += n)
      for (int32_t begin = 0; begin < n; begin += kHeldTokens) {
        shared.reset();
        std::vector<HeldTokens<T, V, kUsual>> lanes;
        for (const int32_t lane : order)
          lanes.emplace_back(p, config, shared.data, batch, first / n, first + begin, lane,
                             static_cast<int32_t>(order.size()));
        const int32_t count = std::min(kHeldTokens, n - begin);
        for (int32_t t = 0; t < count; t += kHeldTogether) {
          const int together = std::min(kHeldTogether, count - t);
          for (auto& lane : lanes) lane.read(together);
          if (p.q.weight != nullptr || p.k.weight != nullptr) {
            for (auto& lane : lanes) lane.sum_heads();
            for (auto& lane : lanes) lane.scale_heads();
          }
          for (auto& lane : lanes) {
            lane.write(together);
            lane.advance();
          }
        }
        whole &= shared.whole();
      }
  return whole;
}

HeadRows rows(const void* data, const int64_t*& strides) {
  HeadRows out{data, strides[0], strides[1], strides[2]};
  strides += 3;
  return out;
}
MutableHeadRows mutable_rows(void* data, const int64_t*& strides) {
  MutableHeadRows out{data, strides[0], strides[1], strides[2]};
  strides += 3;
  return out;
}

}  // namespace
}  // namespace rf::rope_append

// sizes: dtype, norm, D, N, B, Hq, Hkv, q float weight, k float weight, slots batch stride, slots stride, n,
// T,
//        angles batch stride, layout, number of axes, [length, pairs, offset] of each.
// strides: batch, token, head of q, q_out, k, k_cache, v, v_cache. threads: of a CTA, 0 for the chosen
// number. Returns the elements of one access (ten times that where tokens are held, a hundred times on the
// straight way), or -1 if a lane wrote beyond its shared memory.
extern "C" int rope_append_lanes(const int64_t* sizes, const int64_t* strides, void* const* data, double eps,
                                 int threads, int reversed) {
  using namespace rf;
  using namespace rf::rope_append;
  Params p{};
  p.dtype = static_cast<Dtype>(sizes[0]);
  p.norm = static_cast<NormScope>(sizes[1]);
  p.eps = eps;
  p.head_dim = static_cast<int32_t>(sizes[2]);
  p.tokens = static_cast<int32_t>(sizes[3]);
  p.batch = sizes[4];
  p.q.heads = static_cast<int32_t>(sizes[5]);
  p.k.heads = static_cast<int32_t>(sizes[6]);
  p.q.in = rows(data[0], strides);
  p.q.out = mutable_rows(data[1], strides);
  p.k.in = rows(data[2], strides);
  p.k.out = mutable_rows(data[3], strides);
  p.v = rows(data[4], strides);
  p.v_cache = mutable_rows(data[5], strides);
  p.slots = static_cast<const int32_t*>(data[6]);
  p.angles = data[7];
  p.q.weight = data[8];
  p.k.weight = data[9];
  p.q.float_weight = sizes[7] != 0;
  p.k.float_weight = sizes[8] != 0;
  p.slots_batch_stride = sizes[9];
  p.slots_stride = sizes[10];
  p.frame_tokens = static_cast<int32_t>(sizes[11]);
  p.cache_tokens = sizes[12];
  p.angles_batch_stride = sizes[13];
  p.axes.layout = static_cast<RopeLayout>(sizes[14]);
  p.axes.count = static_cast<int32_t>(sizes[15]);
  for (int32_t a = 0; a < p.axes.count; ++a) {
    p.axes.axis[a] = {static_cast<int32_t>(sizes[16 + 3 * a]), static_cast<int32_t>(sizes[17 + 3 * a]),
                      sizes[18 + 3 * a]};
    p.axes.pairs += p.axes.axis[a].pairs;
  }
  Config config = choose_config(p);
  const bool held = config.held && (threads == 0 || threads >= config.threads);
  std::vector<int32_t> order(static_cast<size_t>(threads > 0 ? threads : config.threads));
  std::iota(order.begin(), order.end(), 0);
  if (reversed != 0) std::reverse(order.begin(), order.end());
  const bool whole = with_dtype(p.dtype, [&]<typename T>() {
    constexpr int kVector = 16 / sizeof(T);
    if (config.vector != kVector) return run<T, 1>(p, config, order);
    if (!held) return run<T, kVector>(p, config, order);
    return config.usual ? run_held<T, kVector, true>(p, config, order)
                        : run_held<T, kVector, false>(p, config, order);
  });
  return !whole ? -1 : config.vector * (held ? config.usual ? 100 : 10 : 1);
}

// Bytes that vector accesses have moved since the last question.
extern "C" int64_t rope_append_moved_bytes() {
  return std::exchange(rf::moved_bytes, 0);
}
