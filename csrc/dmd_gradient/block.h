// What the kernels of dmd_gradient share: sums over a block in a fixed order, the divisor of a sample, and
// what the last block does. Device code, for launch.cu.
#pragma once

#include "csrc/dmd_gradient/kernel.h"

namespace rf::dmd_gradient {

constexpr int kWarps = kThreads / 32;
constexpr unsigned kFull = 0xFFFFFFFFu;

enum class Mode : int { kResident, kMeasure, kFinish };

template <typename V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(kFull, v, lane);
  return v;
}
template <typename V>
__device__ __forceinline__ V warp_max(V v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    const V other = __shfl_xor_sync(kFull, v, lane);
    v = other > v ? other : v;
  }
  return v;
}

template <int N, typename A>
__device__ __forceinline__ A tree_sum(const A* v) {
  return tree_sum_as<N, A>(v);
}
template <typename M>
__device__ __forceinline__ M warps_max(const M* v) {
  M largest = v[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) largest = v[w] > largest ? v[w] : largest;
  return largest;
}

// One entry per warp; tiles alternate between two rows, so that one barrier a tile is enough.
template <typename A>
struct Shared {
  A first[2][kWarps];
  A second[2][kWarps];
  double distance[2][kWarps];
  magnitude_t<A> peak[2][kWarps];
  double wide[kWarps];
  long long count[kWarps];
  Normalizer<A> normalizer;
  A scale;
  bool last;
};

// The divisor of a sample from its tiles, in every thread of the block.
template <typename P, typename A>
__device__ __forceinline__ Normalizer<A> sample_normalizer(const Params& p, Shared<A>& shared, int64_t b) {
  double distance = 0;
  magnitude_t<A> peak = 0;
#pragma unroll 4
  for (int64_t t = threadIdx.x; t < p.tiles; t += kThreads) {
    distance += __ldcg(p.distance_sum + b * p.tiles + t);
    const magnitude_t<A> m = __ldcg(static_cast<const magnitude_t<A>*>(p.peak) + b * p.tiles + t);
    peak = m > peak ? m : peak;
  }
  distance = warp_sum(distance);
  peak = warp_max(peak);
  __syncthreads();  // the previous use of the arrays is over
  if (threadIdx.x % 32 == 0) {
    shared.wide[threadIdx.x / 32] = distance;
    shared.peak[0][threadIdx.x / 32] = peak;
  }
  __syncthreads();
  if (threadIdx.x == 0)
    shared.normalizer = make_normalizer<A>(
        tree_sum<kWarps>(shared.wide), p.sample_size, p.normalize, p.eps, p.floor, warps_max(shared.peak[0]),
        p.nan_rule == NanRule::kPublished, static_cast<A>(largest_finite<P>()));
  __syncthreads();
  return shared.normalizer;
}

// The last block: losses and norms of samples (a warp each) and of the batch, in a fixed order.
template <typename P, typename A>
__device__ __forceinline__ void finish_batch(const Params& p, Shared<A>& shared, A scale) {
  __threadfence();  // threads of this block wrote the sums of its tiles
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(p.ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!shared.last) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double batch_loss = 0;
  long long dropped = 0;
  for (int64_t b = warp; b < p.batch; b += kWarps) {
    double loss = 0, norm = 0;
#pragma unroll 4
    for (int64_t t = lane; t < p.tiles; t += 32) {
      loss += __ldcg(static_cast<const A*>(p.loss_sum) + b * p.tiles + t);
      norm += __ldcg(static_cast<const A*>(p.norm_sum) + b * p.tiles + t);
    }
    loss = scale > A(0) ? warp_sum(loss) * (0.5 * static_cast<double>(scale)) : 0.0;
    norm = warp_sum(norm);
    batch_loss += loss;
    if (p.tiles > 0) dropped += __ldcg(p.drop + b);
    if (lane == 0) {
      static_cast<A*>(p.sample_loss)[b] = static_cast<A>(loss);
      static_cast<A*>(p.gradient_norm)[b] =
          static_cast<A>(p.tiles > 0 ? norm / static_cast<double>(p.sample_size) : 0.0);
      if (p.tiles == 0)  // no block has met this sample
        static_cast<A*>(p.normalizer)[b] = p.normalize ? static_cast<A>(fmax(p.eps, p.floor)) : A(1);
    }
  }
  if (lane == 0) {
    shared.wide[warp] = batch_loss;
    shared.count[warp] = dropped;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *static_cast<A*>(p.loss) = static_cast<A>(tree_sum<kWarps>(shared.wide));
    *static_cast<A*>(p.scale) = scale;
    *p.dropped = tree_sum<kWarps>(shared.count);
  }
}

}  // namespace rf::dmd_gradient
