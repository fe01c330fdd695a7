// CUDA backend: one kernel body in three modes. A block owns contiguous tiles; what a sample needs of other
// blocks goes through the workspace.
//
// resident: one cooperative launch, while the differences of all tiles fit in shared memory. They stay there
//           across the grid barrier, so every input is read once.
// measure, finish: the two halves as two launches for larger batches; the second reads the predictions again.
//
// The usual call (straight.h) has kernels of its own, one for each mode: the same tiles, the same sums, the
// same launches.
//
// The last block to finish (an integer ticket) forms the sums over samples. No float atomics: every sum has a
// fixed order that depends on the tile alone.
#include <cooperative_groups.h>

#include "csrc/common/cuda_call.h"
#include "csrc/dmd_gradient/block.h"
#include "csrc/dmd_gradient/kernel.h"
#include "csrc/dmd_gradient/launch.h"
#include "csrc/dmd_gradient/straight_kernel.h"

namespace rf::dmd_gradient {
namespace {

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
template <auto kKernel, typename A>
CudaStatus plan_resident(const Device& device, int64_t tiles, int& grid, int& bytes) {
  grid = 0;
  if (!device.cooperative || tiles == 0) return {};
  int most_bytes = 0;
  if (const CudaStatus status = opt_in_shared_memory<kKernel>(most_bytes); !status.ok()) return status;
  for (int blocks = kBlocksPerProcessor; blocks > 0; blocks /= 2) {
    const int64_t most = static_cast<int64_t>(blocks) * device.processors;
    const int64_t each = (tiles + most - 1) / most;
    const int64_t needed = each * kTile * static_cast<int64_t>(sizeof(A));
    if (needed > most_bytes) continue;
    int fit = 0;
    RF_CUDA_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor, &fit, kKernel, kThreads,
                static_cast<size_t>(needed));
    const int64_t wanted = (tiles + each - 1) / each;
    if (wanted > static_cast<int64_t>(fit) * device.processors) continue;
    grid = static_cast<int>(wanted);
    bytes = static_cast<int>(needed);
    return {};
  }
  return {};
}

template <typename Kernel, typename... Arguments>
CudaStatus launch_resident(Kernel kernel, int grid, int bytes, void* stream, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  RF_CUDA_TRY(cudaLaunchCooperativeKernel, reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads),
              pointers, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return {};
}

// Grid of the two launches.
int grid_of(const Device& device, int64_t tiles) {
  const int64_t most = static_cast<int64_t>(device.processors) * kBlocksPerProcessor;
  return static_cast<int>(tiles < most ? (tiles > 0 ? tiles : 1) : most);
}

template <typename T, typename P>
CudaStatus launch(const Params& p, void* stream) {
  const int64_t tiles = p.batch * p.tiles;
  Device device;
  int grid = 0, bytes = 0;
  if (const CudaStatus status = query(device); !status.ok()) return status;
  if (const CudaStatus status = plan_resident<dmd_kernel<T, P>, acc_t<T>>(device, tiles, grid, bytes);
      !status.ok())
    return status;
  if (grid > 0) return launch_resident(dmd_kernel<T, P>, grid, bytes, stream, p, Mode::kResident, grid);
  grid = grid_of(device, tiles);
  const CudaStatus measured = launch_kernel("launch of dmd_kernel (measure)", dmd_kernel<T, P>, grid,
                                            kThreads, 0, stream, p, Mode::kMeasure, grid);
  if (!measured.ok()) return measured;
  return launch_kernel("launch of dmd_kernel (finish)", dmd_kernel<T, P>, grid, kThreads, 0, stream, p,
                       Mode::kFinish, grid);
}

template <typename T>
CudaStatus launch_straight(const Params& p, void* stream) {
  const int64_t tiles = p.batch * p.tiles;
  Device device;
  int grid = 0, bytes = 0;
  if (const CudaStatus status = query(device); !status.ok()) return status;
  constexpr auto kResident = dmd_straight_kernel<T, Mode::kResident>;
  if (const CudaStatus status = plan_resident<kResident, float>(device, tiles, grid, bytes); !status.ok())
    return status;
  const bool resident = grid > 0;
  if (!resident) grid = grid_of(device, tiles);
  const double elements = static_cast<double>(p.batch * p.sample_size);
  const Split split{static_cast<int>(tiles / grid), static_cast<int>(tiles % grid),
                    p.mean ? static_cast<float>(1.0 / elements) : 1.0f};
  if (resident) return launch_resident(kResident, grid, bytes, stream, p, split);
  const CudaStatus measured =
      launch_kernel("launch of dmd_straight_kernel (measure)", dmd_straight_kernel<T, Mode::kMeasure>, grid,
                    kThreads, 0, stream, p, split);
  if (!measured.ok()) return measured;
  return launch_kernel("launch of dmd_straight_kernel (finish)", dmd_straight_kernel<T, Mode::kFinish>, grid,
                       kThreads, 0, stream, p, split);
}

}  // namespace

CudaStatus run_cuda(const Params& p, void* stream) {
  return with_types(p, [&]<typename T, typename P>() {
    if constexpr (std::is_same_v<T, P> && sizeof(T) <= 4)
      if (usual(p)) return launch_straight<T>(p, stream);
    return launch<T, P>(p, stream);
  });
}

}  // namespace rf::dmd_gradient
