// The CUDA kernels of the usual call (straight.h), one for each mode. Device code, for launch.cu.
#pragma once

#include <cooperative_groups.h>

#include "csrc/dmd_gradient/block.h"
#include "csrc/dmd_gradient/straight.h"

namespace rf::dmd_gradient {

// How a launch deals its tiles, and what the host knows already.
struct Split {
  int each, rest;  // tiles of every block; the first `rest` have one more
  float scale;     // 1 / N, or 1
};

// Sums of the warps for as many tiles as are under way between two barriers.
constexpr int kRows = 16;
struct Rows {
  double distance[kRows][kWarps];
  int32_t peak[kRows][kWarps];
  float sums[2][kRows][kWarps];
  Divider divided;
};

// One step of two butterflies at once: lanes without `bit` go on with a, the others with b. Sums of two are
// the same in any order, so the bits are those of warp_sum.
template <typename V>
__device__ __forceinline__ V split_sum(V a, V b, int bit) {
  const bool upper = threadIdx.x & bit;
  const V mine = upper ? b : a, other = upper ? a : b;
  return mine + __shfl_xor_sync(kFull, other, bit);
}
template <typename V>
__device__ __forceinline__ V rest_sum(V v, int below) {
#pragma unroll
  for (int lane = below / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(kFull, v, lane);
  return v;
}

// Where a block keeps vector `k` of its thread: pieces of 16 bytes, a warp's side by side.
template <typename T>
__device__ __forceinline__ float* kept_at(float* kept, int k) {
  return kept + (k * kThreads * kWidth<T>)+threadIdx.x * 4;
}

// Tiles of one sample from `tile` on. kTiles neighbours; kWhole: no thread is beyond the sample's end.
template <typename T>
struct Straight {
  static constexpr int kStep = kThreads * kWidth<T>, kPieces = kWidth<T> / 4;
  const Params& p;
  Rows& rows;
  int64_t at;    // of the thread's first element in the tensors
  int64_t left;  // elements of the sample from there on
  float* kept;
  int row = 0;

  __device__ Straight(const Params& params, Rows& shared, int64_t b, int tile, float* dynamic)
      : p(params), rows(shared), kept(dynamic) {
    const int64_t first = int64_t{tile} * kTile + threadIdx.x * kWidth<T>;
    at = b * p.sample_size + first;
    left = p.sample_size - first;
  }

  template <bool kWhole>
  __device__ __forceinline__ bool active(int k) const {
    return kWhole || k * kStep < left;
  }
  __device__ __forceinline__ auto load(const void* base, int k) const {
    return load_vec<kWidth<T>>(static_cast<const T*>(base) + at + k * kStep);
  }

  template <int kVectors, bool kWhole>
  __device__ __forceinline__ void read(Read<T> (&in)[kVectors], bool with_x) const {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if constexpr (!kWhole) in[k] = Read<T>{};
      if (!active<kWhole>(k)) continue;
      in[k].fake = load(p.fake, k);
      in[k].real = load(p.real, k);
      in[k].uncond = load(p.real_uncond, k);
      if (with_x) in[k].x = load(p.x, k);
    }
  }

  template <int kTiles, bool kWhole, bool kKept>
  __device__ __forceinline__ void measure(float guidance, float peak_of_weight) {
    constexpr int kVectors = kTiles * kTileVectors<T>;
    Read<T> in[kVectors];
    read<kVectors, kWhole>(in, true);
    double sum[kTiles];
    int peak[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float largest = peak_of_weight;
      sum[tile] = 0;
#pragma unroll
      for (int v = 0; v < kTileVectors<T>; ++v) {
        const int k = tile * kTileVectors<T> + v;
        float difference[kWidth<T>];
        measure_vector<T>(in[k], guidance, difference, sum[tile], largest);
        if constexpr (kKept) {
#pragma unroll
          for (int j = 0; j < kPieces; ++j)
            store_vec(kept_at<T>(kept, k) + j * kThreads * 4,
                      Vec<float, 4>{difference[4 * j], difference[4 * j + 1], difference[4 * j + 2],
                                    difference[4 * j + 3]});
        }
      }
      peak[tile] = __reduce_max_sync(kFull, magnitude_bits(largest));
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (kTiles == 2) {
      const double total = rest_sum(split_sum(sum[0], sum[1], 16), 16);
      if (lane % 16 == 0) {
        rows.distance[row + lane / 16][warp] = total;
        rows.peak[row + lane / 16][warp] = lane == 0 ? peak[0] : peak[1];
      }
    } else {
      const double total = warp_sum(sum[0]);
      if (lane == 0) {
        rows.distance[row][warp] = total;
        rows.peak[row][warp] = peak[0];
      }
    }
    advance<kTiles>();
  }

  template <int kTiles, bool kWhole, bool kKept>
  __device__ __forceinline__ void finish(float guidance, const Divider& divided, float weight, float scaled) {
    constexpr int kVectors = kTiles * kTileVectors<T>;
    float difference[kVectors][kWidth<T>];
    if constexpr (kKept) {
#pragma unroll
      for (int k = 0; k < kVectors; ++k)
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          const Vec<float, 4> piece = load_vec<4>(kept_at<T>(kept, k) + j * kThreads * 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) difference[k][4 * j + e] = piece.v[e];
        }
    } else {
      Read<T> in[kVectors];
      read<kVectors, kWhole>(in, false);
      float real[kWidth<T>];
#pragma unroll
      for (int k = 0; k < kVectors; ++k) difference_of<T>(in[k], guidance, difference[k], real);
    }
    float sums[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float loss = 0, norm = 0;
#pragma unroll
      for (int v = 0; v < kTileVectors<T>; ++v) {
        const int k = tile * kTileVectors<T> + v;
        const auto out = finish_vector<T>(difference[k], divided, weight, scaled, loss, norm);
        if (active<kWhole>(k)) store_global(static_cast<T*>(p.gradient) + at + k * kStep, out);
      }
      sums[tile] = split_sum(loss, norm, 16);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if constexpr (kTiles == 2) {
      const float total = rest_sum(split_sum(sums[0], sums[1], 8), 8);
      if (lane % 8 == 0) rows.sums[lane / 16][row + lane / 8 % 2][warp] = total;
    } else {
      const float total = rest_sum(sums[0], 16);
      if (lane % 16 == 0) rows.sums[lane / 16][row][warp] = total;
    }
    advance<kTiles>();
  }

  template <int kTiles>
  __device__ __forceinline__ void advance() {
    at += kTiles * kTile;
    left -= kTiles * kTile;
    kept += kTiles * kTile;
    row += kTiles;
  }
};

// turn.operator()<tiles, whole>() over `count` tiles of which `whole` are complete.
template <typename T, typename Turn>
__device__ __forceinline__ void turns(int count, int whole, Turn&& turn) {
  constexpr int kTiles = kTurnVectors / kTileVectors<T>;
  int i = 0;
#pragma unroll 1
  for (; i + kTiles <= whole; i += kTiles) turn.template operator()<kTiles, true>();
  if constexpr (kTiles > 1)
    if (i < whole) {
      turn.template operator()<1, true>();
      ++i;
    }
  if (i < count) turn.template operator()<1, false>();
}

// body(b, tile of the sample, tile of the batch, count, how many of them are complete) over begin .. end, at
// most kRows of one sample at a time.
template <typename Body>
__device__ __forceinline__ void chunks(const Params& p, int begin, int end, Body&& body) {
  const int tiles = static_cast<int>(p.tiles), complete = static_cast<int>(p.sample_size / kTile);
  int b = begin / tiles, tile = begin - b * tiles;
#pragma unroll 1
  for (int t = begin; t < end;) {
    int count = tiles - tile < end - t ? tiles - tile : end - t;
    count = count < kRows ? count : kRows;
    const int whole = complete - tile < count ? complete - tile : count;
    body(b, tile, t, count, whole);
    t += count;
    tile += count;
    if (tile == tiles) {
      tile = 0;
      ++b;
    }
  }
}

template <typename T, Mode kMode>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    dmd_straight_kernel(const __grid_constant__ Params p, const __grid_constant__ Split split) {
  constexpr bool kKept = kMode == Mode::kResident;
  __shared__ Shared<float> shared;
  __shared__ Rows rows;
  extern __shared__ __align__(16) unsigned char dynamic[];
  float* const kept = reinterpret_cast<float*>(dynamic);
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int begin = block * split.each + (block < split.rest ? block : split.rest);
  const int end = begin + split.each + (block < split.rest ? 1 : 0);
  const float guidance = static_cast<float>(p.real_guidance);

  if constexpr (kMode != Mode::kFinish) {
    if (block == 0 && thread == 0) *p.ticket = 0;
    chunks(p, begin, end, [&](int b, int tile, int t, int count, int whole) {
      Straight<T> straight(p, rows, b, tile, kept + (t - begin) * kTile);
      const float peak = weight_peak(sample_weight(p, b));
      turns<T>(count, whole, [&]<int kTiles, bool kWhole>() {
        straight.template measure<kTiles, kWhole, kKept>(guidance, peak);
      });
      __syncthreads();
      if (thread < count) {
        p.distance_sum[t + thread] = tree_sum<kWarps>(rows.distance[thread]);
        static_cast<int32_t*>(p.peak)[t + thread] = warps_max(rows.peak[thread]);
      }
      __syncthreads();
    });
    if constexpr (kMode == Mode::kMeasure) return;
    cooperative_groups::this_grid().sync();
  }

  if constexpr (kMode != Mode::kMeasure) {
    const float scale = p.scale_gradient ? split.scale : 1.0f;
    int sample = -1;
    Normalizer<float> n{};
    chunks(p, begin, end, [&](int b, int tile, int t, int count, int whole) {
      if (b != sample) {
        n = sample_normalizer<T>(p, shared, sample = b);
        if (thread == 0) rows.divided = Divider(n.divisor);
        __syncthreads();
      }
      if (tile == 0 && thread == 0) {
        static_cast<float*>(p.normalizer)[b] = n.divisor;
        p.drop[b] = n.dropped;
      }
      if (n.silent) {
        T* const gradient = static_cast<T*>(p.gradient) + b * p.sample_size;
        const int64_t first = int64_t{tile} * kTile, last = first + int64_t{count} * kTile;
        const int64_t stop = last < p.sample_size ? last : p.sample_size;
#pragma unroll 1
        for (int64_t i = first + thread * kWidth<T>; i < stop; i += kThreads * kWidth<T>)
          store_global(gradient + i, Vec<T, kWidth<T>>{});
        if (thread < count)
          static_cast<float*>(p.loss_sum)[t + thread] = static_cast<float*>(p.norm_sum)[t + thread] = 0;
        return;
      }
      Straight<T> straight(p, rows, b, tile, kept + (t - begin) * kTile);
      const Divider divided = rows.divided;
      const float weight = sample_weight(p, b), scaled = weight * scale;
      turns<T>(count, whole, [&]<int kTiles, bool kWhole>() {
        straight.template finish<kTiles, kWhole, kKept>(guidance, divided, weight, scaled);
      });
      __syncthreads();
      if (thread < count) {
        static_cast<float*>(p.loss_sum)[t + thread] = tree_sum<kWarps>(rows.sums[0][thread]);
        static_cast<float*>(p.norm_sum)[t + thread] = tree_sum<kWarps>(rows.sums[1][thread]);
      }
      __syncthreads();
    });
    finish_batch<T>(p, shared, split.scale);
  }
}

}  // namespace rf::dmd_gradient
