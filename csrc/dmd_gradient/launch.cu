// CUDA backend: one kernel body in three modes. A block owns contiguous tiles; what a sample needs of other
// blocks goes through the workspace.
//
// resident: one cooperative launch, while the differences of all tiles fit in shared memory. They stay there
//           across the grid barrier, so every input is read once.
// measure, finish: the two halves as two launches for larger batches; the second reads the predictions again.
//
// The last block to finish (an integer ticket) forms the sums over samples. No float atomics: every sum has a
// fixed order that depends on the tile alone.
#include <cooperative_groups.h>

#include "csrc/common/cuda_call.h"
#include "csrc/dmd_gradient/kernel.h"
#include "csrc/dmd_gradient/launch.h"

namespace rf::dmd_gradient {
namespace {

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

// A power of two of values, as a tree.
template <int N, typename S, typename A>
__device__ __forceinline__ S tree_sum_as(const A* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    return tree_sum_as<N / 2, S>(v) + tree_sum_as<N / 2, S>(v + N / 2);
  }
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

struct Tile {
  int64_t b, begin;
  int size;
};

__device__ __forceinline__ Tile tile_at(const Params& p, int64_t index) {
  const int64_t b = index / p.tiles, begin = (index - b * p.tiles) * kTile;
  const int64_t left = p.sample_size - begin;
  return {b, begin, static_cast<int>(left < kTile ? left : kTile)};
}

// Tiles of a block: contiguous, so that it meets few samples.
struct Range {
  int64_t begin, end;
};
__device__ __forceinline__ Range block_range(int64_t tiles) {
  const int64_t each = tiles / gridDim.x, rest = tiles % gridDim.x, g = blockIdx.x;
  const int64_t begin = g * each + (g < rest ? g : rest);
  return {begin, begin + each + (g < rest ? 1 : 0)};
}

// Pass 1 on one tile; `kept`: where the block keeps the tile's differences, or null.
template <typename T, typename P, typename A>
__device__ __forceinline__ void measure_tile(const Params& p, Shared<A>& shared, int64_t index, A* kept,
                                             int& selected) {
  constexpr int V = vector_width(sizeof(T), sizeof(P));
  const Tile tile = tile_at(p, index);
  double sum = 0;  // the distances of finite data may add up to more than the largest float
  magnitude_t<A> peak = 0;
#pragma unroll 1
  for (int at = threadIdx.x * V; at < tile.size; at += kThreads * V) {
    const int n = tile.size - at < V ? tile.size - at : V;
    const int64_t i = tile.begin + at;
    A difference[V], distance[V];
#pragma unroll
    for (int k = 0; k < V; ++k) distance[k] = A(0);
    estimate<T, P, V>(p, tile.b, i, n, p.normalize, difference, distance);
    sum += tree_sum_as<V, double>(distance);
    const magnitude_t<A> m = peak_of<V>(p, tile.b, i, n, difference);
    peak = m > peak ? m : peak;
    selected += p.mask.data != nullptr ? count_selected<V>(p, tile.b, i, n) : n;
    if (kept != nullptr) {
      Vec<A, V> packed;
#pragma unroll
      for (int k = 0; k < V; ++k) packed.v[k] = difference[k];
      store_vec(kept + at, packed);
    }
  }
  sum = warp_sum(sum);
  peak = warp_max(peak);
  const int row = index & 1;
  if (threadIdx.x % 32 == 0) {
    shared.distance[row][threadIdx.x / 32] = sum;
    shared.peak[row][threadIdx.x / 32] = peak;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    p.distance_sum[index] = tree_sum<kWarps>(shared.distance[row]);
    static_cast<magnitude_t<A>*>(p.peak)[index] = warps_max(shared.peak[row]);
  }
}

// Selected elements of the block's tiles; integers, so the split over blocks leaves no trace.
template <typename A>
__device__ __forceinline__ void store_selected(const Params& p, Shared<A>& shared, int selected) {
  const long long total = warp_sum(static_cast<long long>(selected));
  if (threadIdx.x % 32 == 0) shared.count[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    p.selected[blockIdx.x] = tree_sum<kWarps>(shared.count);
    if (blockIdx.x == 0) *p.ticket = 0;
  }
}

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
    shared.normalizer = make_normalizer<A>(tree_sum<kWarps>(shared.wide), p.sample_size, p.normalize, p.eps,
                                           warps_max(shared.peak[0]), p.nan_rule == NanRule::kPublished,
                                           static_cast<A>(largest_finite<P>()));
  __syncthreads();
  return shared.normalizer;
}

// 1 / N from the counts of all blocks of pass 1, in every thread.
template <typename A>
__device__ __forceinline__ A batch_scale(const Params& p, Shared<A>& shared, int blocks) {
  if (!p.mean) return A(1);
  long long selected = 0;
  for (int g = threadIdx.x; g < blocks; g += kThreads)
    selected += __ldcg(reinterpret_cast<const long long*>(p.selected) + g);
  selected = warp_sum(selected);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.count[threadIdx.x / 32] = selected;
  __syncthreads();
  if (threadIdx.x == 0) {
    const long long total = tree_sum<kWarps>(shared.count);
    shared.scale = total > 0 ? static_cast<A>(1.0 / static_cast<double>(total)) : A(0);
  }
  __syncthreads();
  return shared.scale;
}

// Pass 2 on one tile: the gradient, stored, and the tile's sums of w m d^2 and |d|.
template <typename T, typename P, typename A>
__device__ __forceinline__ void finish_tile(const Params& p, Shared<A>& shared, int64_t index,
                                            const Tile& tile, const Normalizer<A>& n, A scale,
                                            const A* kept) {
  constexpr int V = vector_width(sizeof(T), sizeof(P));
  A loss = 0, norm = 0;
#pragma unroll 1
  for (int at = threadIdx.x * V; at < tile.size; at += kThreads * V) {
    const int count = tile.size - at < V ? tile.size - at : V;
    const int64_t i = tile.begin + at;
    A difference[V], loss_term[V], norm_term[V];
    if (n.silent) {
#pragma unroll
      for (int k = 0; k < V; ++k) difference[k] = A(0);
      store<V, T>(p.gradient, tile.b * p.sample_size + i, count, p.vectorised, difference);
      continue;
    }
    if (kept != nullptr) {
      const Vec<A, V> packed = load_vec<V>(kept + at);
#pragma unroll
      for (int k = 0; k < V; ++k) difference[k] = packed.v[k];
    } else {
      estimate<T, P, V>(p, tile.b, i, count, false, difference, static_cast<A*>(nullptr));
    }
    finish<T, P, V>(p, tile.b, i, count, n.divisor, scale, difference, loss_term, norm_term);
    loss += tree_sum<V>(loss_term);
    norm += tree_sum<V>(norm_term);
  }
  loss = warp_sum(loss);
  norm = warp_sum(norm);
  const int row = index & 1;
  if (threadIdx.x % 32 == 0) {
    shared.first[row][threadIdx.x / 32] = loss;
    shared.second[row][threadIdx.x / 32] = norm;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    static_cast<A*>(p.loss_sum)[index] = tree_sum<kWarps>(shared.first[row]);
    static_cast<A*>(p.norm_sum)[index] = tree_sum<kWarps>(shared.second[row]);
  }
}

// The last block: losses and norms of samples (a warp each) and of the batch, in a fixed order.
template <typename P, typename A>
__device__ __forceinline__ void finish_batch(const Params& p, Shared<A>& shared, A scale) {
  __threadfence();  // thread 0 wrote the sums of this block's tiles
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
        static_cast<A*>(p.normalizer)[b] = p.normalize ? static_cast<A>(p.eps) : A(1);
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

// measure_blocks: grid of the launch that measured.
template <typename T, typename P>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    dmd_kernel(const __grid_constant__ Params p, Mode mode, int measure_blocks) {
  using A = acc_t<T>;
  __shared__ Shared<A> shared;
  extern __shared__ __align__(16) unsigned char dynamic[];
  const Range range = block_range(p.batch * p.tiles);
  A* const kept = mode == Mode::kResident ? reinterpret_cast<A*>(dynamic) : nullptr;

  if (mode != Mode::kFinish) {
    int selected = 0;
#pragma unroll 1
    for (int64_t t = range.begin; t < range.end; ++t)
      measure_tile<T, P>(p, shared, t, kept != nullptr ? kept + (t - range.begin) * kTile : nullptr,
                         selected);
    store_selected(p, shared, selected);
    if (mode == Mode::kMeasure) return;
    cooperative_groups::this_grid().sync();
  }

  const A scale = batch_scale(p, shared, measure_blocks);
  int64_t sample = -1;
  Normalizer<A> n{};
#pragma unroll 1
  for (int64_t t = range.begin; t < range.end; ++t) {
    const Tile tile = tile_at(p, t);
    if (tile.b != sample) n = sample_normalizer<P>(p, shared, sample = tile.b);
    if (tile.begin == 0 && threadIdx.x == 0) {
      static_cast<A*>(p.normalizer)[tile.b] = n.divisor;
      p.drop[tile.b] = n.dropped;
    }
    finish_tile<T, P>(p, shared, t, tile, n, p.scale_gradient ? scale : A(1),
                      kept != nullptr ? kept + (t - range.begin) * kTile : nullptr);
  }
  finish_batch<P>(p, shared, scale);
}

struct Device {
  int processors = 0;
  int cooperative = 0;
};

CudaStatus query(Device& device) {
  int index = 0;
  RF_CUDA_TRY(cudaGetDevice, &index);
  RF_CUDA_TRY(cudaDeviceGetAttribute, &device.processors, cudaDevAttrMultiProcessorCount, index);
  RF_CUDA_TRY(cudaDeviceGetAttribute, &device.cooperative, cudaDevAttrCooperativeLaunch, index);
  return {};
}

// Grid and shared memory of the resident launch, grid = 0 where the tiles do not fit: fewer, larger blocks
// are tried until one processor's share of the tiles fits into its shared memory.
template <typename T, typename P>
CudaStatus plan_resident(const Device& device, int64_t tiles, int& grid, int& bytes) {
  grid = 0;
  if (!device.cooperative || tiles == 0) return {};
  int most_bytes = 0;
  if (const CudaStatus status = opt_in_shared_memory<dmd_kernel<T, P>>(most_bytes); !status.ok())
    return status;
  for (int blocks = kBlocksPerProcessor; blocks > 0; blocks /= 2) {
    const int64_t most = static_cast<int64_t>(blocks) * device.processors;
    const int64_t each = (tiles + most - 1) / most;
    const int64_t needed = each * kTile * static_cast<int64_t>(sizeof(acc_t<T>));
    if (needed > most_bytes) continue;
    int fit = 0;
    RF_CUDA_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &fit, dmd_kernel<T, P>, kThreads,
                static_cast<size_t>(needed));
    const int64_t wanted = (tiles + each - 1) / each;
    if (wanted > static_cast<int64_t>(fit) * device.processors) continue;
    grid = static_cast<int>(wanted);
    bytes = static_cast<int>(needed);
    return {};
  }
  return {};
}

template <typename T, typename P>
CudaStatus launch(Params p, void* stream) {
  const int64_t tiles = p.batch * p.tiles;
  Device device;
  int grid = 0, bytes = 0;
  if (const CudaStatus status = query(device); !status.ok()) return status;
  if (const CudaStatus status = plan_resident<T, P>(device, tiles, grid, bytes); !status.ok()) return status;
  if (grid > 0) {
    Mode mode = Mode::kResident;
    void* arguments[] = {&p, &mode, &grid};
    RF_CUDA_TRY(cudaLaunchCooperativeKernel, reinterpret_cast<const void*>(&dmd_kernel<T, P>), dim3(grid),
                dim3(kThreads), arguments, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
    return {};
  }
  const int64_t most = static_cast<int64_t>(device.processors) * kBlocksPerProcessor;
  grid = static_cast<int>(tiles < most ? (tiles > 0 ? tiles : 1) : most);
  const CudaStatus measured = launch_kernel("launch of dmd_kernel (measure)", dmd_kernel<T, P>, grid,
                                            kThreads, 0, stream, p, Mode::kMeasure, grid);
  if (!measured.ok()) return measured;
  return launch_kernel("launch of dmd_kernel (finish)", dmd_kernel<T, P>, grid, kThreads, 0, stream, p,
                       Mode::kFinish, grid);
}

}  // namespace

CudaStatus run_cuda(const Params& p, void* stream) {
  return with_types(p, [&]<typename T, typename P>() { return launch<T, P>(p, stream); });
}

}  // namespace rf::dmd_gradient
