// CPU backend: two parallel passes over fixed tiles, the sums of a sample in between.
#include <cstring>
#include <type_traits>

// A loop that copies floats is one vector instruction for eight; as the call of memcpy that gcc makes of it,
// it would be 16-byte moves through memory.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-loop-distribute-patterns")
#endif

#include "csrc/common/torch_stable.h"
#include "csrc/dmd_gradient/kernel.h"
#include "csrc/dmd_gradient/launch.h"

namespace rf::dmd_gradient {
namespace {

// Elements per call of the shared body: enough for full vectors, few enough to stay in registers and L1.
constexpr int kChunk = 64;
// Tiles a thread takes at least.
constexpr int64_t kGrain = 4;

// Where the gradient has the arithmetic's own type, its memory holds the differences between the passes: one
// tensor to read again instead of all predictions.
template <typename T>
constexpr bool kKept = std::is_same_v<T, acc_t<T>>;

// Sum of kTile terms by halving: element e meets e + 1024, then e + 512, ... Vectorises without reordering.
template <typename A>
A tile_sum(A* term) {
  for (int half = kTile / 2; half > 0; half /= 2)
    for (int e = 0; e < half; ++e) term[e] += term[e + half];
  return term[0];
}

// The same tree in double: the distances of finite data may add up to more than the largest float.
template <typename A>
double wide_tile_sum(const A* term) {
  alignas(64) double sum[kTile / 2];
  for (int e = 0; e < kTile / 2; ++e) sum[e] = static_cast<double>(term[e]) + term[e + kTile / 2];
  for (int half = kTile / 4; half > 0; half /= 2)
    for (int e = 0; e < half; ++e) sum[e] += sum[e + half];
  return sum[0];
}

struct Tile {
  int64_t b, begin;
  int size;
};

Tile tile_at(const Params& p, int64_t index) {
  const int64_t b = index / p.tiles, begin = (index % p.tiles) * kTile;
  const int64_t left = p.sample_size - begin;
  return {b, begin, static_cast<int>(left < kTile ? left : kTile)};
}

template <typename A>
void zero_from(A* term, int begin) {
  const int used = (begin + kChunk - 1) / kChunk * kChunk;  // the body has filled whole chunks
  if (used < kTile) std::memset(term + used, 0, sizeof(A) * (kTile - used));
}

// Pass 1: sum |x - real|, the largest |fake - real| and the number of selected elements of one tile.
template <typename T, typename P>
void measure_tile(const Params& p, int64_t index) {
  using A = acc_t<T>;
  const Tile tile = tile_at(p, index);
  alignas(64) A distance[kTile];
  alignas(64) A difference[kChunk];
  magnitude_t<A> peak = 0;
  int64_t selected = 0;
  for (int c = 0; c < tile.size; c += kChunk) {
    const int64_t i = tile.begin + c;
    const int n = tile.size - c < kChunk ? tile.size - c : kChunk;
    estimate<T, P, kChunk>(p, tile.b, i, n, p.normalize, difference, distance + c);
    if constexpr (kKept<T>) store<kChunk, T>(p.gradient, tile.b * p.sample_size + i, n, true, difference);
    const magnitude_t<A> m = peak_of<kChunk>(p, tile.b, i, n, difference);
    peak = m > peak ? m : peak;
    if (p.mask.data != nullptr) selected += count_selected<kChunk>(p, tile.b, i, n);
  }
  if (p.normalize) zero_from(distance, tile.size);
  p.distance_sum[index] = p.normalize ? wide_tile_sum(distance) : 0.0;
  static_cast<magnitude_t<A>*>(p.peak)[index] = peak;
  p.selected[index] = p.mask.data != nullptr ? selected : tile.size;
}

// Pass 2: the gradient of one tile, and its sums of w m d^2 and |d|.
template <typename T, typename P>
void finish_tile(const Params& p, int64_t index, const Normalizer<acc_t<T>>& n, acc_t<T> scale) {
  using A = acc_t<T>;
  const Tile tile = tile_at(p, index);
  A& loss_sum = static_cast<A*>(p.loss_sum)[index];
  A& norm_sum = static_cast<A*>(p.norm_sum)[index];
  if (n.silent) {
    std::memset(static_cast<T*>(p.gradient) + tile.b * p.sample_size + tile.begin, 0, sizeof(T) * tile.size);
    loss_sum = norm_sum = A(0);
    return;
  }
  alignas(64) A loss_term[kTile];
  alignas(64) A norm_term[kTile];
  alignas(64) A difference[kChunk];
  for (int c = 0; c < tile.size; c += kChunk) {
    const int64_t i = tile.begin + c;
    const int count = tile.size - c < kChunk ? tile.size - c : kChunk;
    if constexpr (kKept<T>)
      load<kChunk, T>(p.gradient, tile.b * p.sample_size + i, count, true, difference);
    else
      estimate<T, P, kChunk>(p, tile.b, i, count, false, difference, static_cast<A*>(nullptr));
    finish<T, P, kChunk>(p, tile.b, i, count, n.divisor, scale, difference, loss_term + c, norm_term + c);
  }
  zero_from(loss_term, tile.size);
  zero_from(norm_term, tile.size);
  loss_sum = tile_sum(loss_term);
  norm_sum = tile_sum(norm_term);
}

template <typename T, typename P>
void run_as(const Params& p) {
  using A = acc_t<T>;
  const int64_t tiles = p.batch * p.tiles;
  torch::stable::parallel_for(0, tiles, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) measure_tile<T, P>(p, t);
  });

  const A limit = static_cast<A>(largest_finite<P>());
  auto normalizer_of = [&](int64_t b) {
    double distance = 0;
    magnitude_t<A> peak = 0;
    for (int64_t t = b * p.tiles; t < (b + 1) * p.tiles; ++t) {
      distance += p.distance_sum[t];
      const magnitude_t<A> m = static_cast<const magnitude_t<A>*>(p.peak)[t];
      peak = m > peak ? m : peak;
    }
    return make_normalizer<A>(distance, p.sample_size, p.normalize, p.eps, p.floor, peak,
                              p.nan_rule == NanRule::kPublished, limit);
  };
  int64_t selected = 0;
  for (int64_t t = 0; t < tiles; ++t) selected += p.selected[t];
  const double divisor = p.mean ? static_cast<double>(selected) : 1.0;
  const A scale = divisor > 0 ? static_cast<A>(1.0 / divisor) : A(0);

  torch::stable::parallel_for(0, tiles, kGrain, [&](int64_t begin, int64_t end) {
    int64_t sample = -1;
    Normalizer<A> n{};
    for (int64_t t = begin; t < end; ++t) {
      if (t / p.tiles != sample) n = normalizer_of(sample = t / p.tiles);
      finish_tile<T, P>(p, t, n, p.scale_gradient ? scale : A(1));
    }
  });

  double loss = 0;
  int64_t dropped = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Normalizer<A> n = normalizer_of(b);
    double sample_loss = 0, norm = 0;
    for (int64_t t = b * p.tiles; t < (b + 1) * p.tiles; ++t) {
      sample_loss += static_cast<const A*>(p.loss_sum)[t];
      norm += static_cast<const A*>(p.norm_sum)[t];
    }
    sample_loss = divisor > 0 ? sample_loss / (2 * divisor) : 0;
    loss += sample_loss;
    dropped += n.dropped;
    static_cast<A*>(p.sample_loss)[b] = static_cast<A>(sample_loss);
    static_cast<A*>(p.gradient_norm)[b] = static_cast<A>(p.sample_size > 0 ? norm / p.sample_size : 0);
    static_cast<A*>(p.normalizer)[b] = n.divisor;
  }
  *static_cast<A*>(p.loss) = static_cast<A>(loss);
  *static_cast<A*>(p.scale) = scale;
  *p.dropped = dropped;
}

}  // namespace

const char* run_cpu(const Params& p) {
  with_types(p, [&]<typename T, typename P>() { run_as<T, P>(p); });
  return "CPU tensors";
}

}  // namespace rf::dmd_gradient
