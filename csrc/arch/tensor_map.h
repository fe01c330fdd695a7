// Host side of TMA: describing a strided [B, T, H, D] tensor of 16-bit elements to the copy engine.
#pragma once

#include <cstdint>

#include "csrc/arch/platform.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace rf::arch {

// A rank-5 view {64, rows, head_dim / 64, heads, batch}: 64 elements are one 128-byte swizzle span, so one
// instruction fills a [head_dim / 64][box_rows][64] tile; a box cannot cross heads, and rows from `rows` on
// arrive as zeros.
struct TileSource {
  const void* data;
  int batch, rows, heads, head_dim;
  int64_t batch_stride, row_stride, head_stride;  // in elements; the last dimension is contiguous
  int box_rows;
  bool fp16;
};

// What TMA demands of the memory; nullptr when it can be used.
inline const char* tile_source_problem(const TileSource& s) {
  if (reinterpret_cast<uintptr_t>(s.data) % 16 != 0) return "TMA needs data that is 16-byte aligned";
  if (s.head_dim % 64 != 0) return "the tiles need a head dimension that is a multiple of 64";
  const int64_t strides[] = {s.row_stride, s.head_stride, s.batch_stride};
  const int sizes[] = {s.rows, s.heads, s.batch};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && (strides[i] % 8 != 0 || strides[i] <= 0 || strides[i] >= int64_t{1} << 39))
      return "TMA needs strides that are positive multiples of 8 elements (16 bytes) below 2^39";
  if (s.box_rows > 256) return "TMA takes tiles of at most 256 rows";
  return nullptr;
}

namespace detail {
struct Rank5 {
  uint64_t size[5];
  uint64_t stride_bytes[5];
  uint32_t box[5];
};
inline Rank5 rank5(const TileSource& s) {
  const auto u = [](int64_t x) { return static_cast<uint64_t>(x); };
  // A dimension of size 1 is never stepped over; the encoder wants a positive stride all the same.
  const auto step = [&](int size, int64_t stride) { return size > 1 ? u(stride) * 2 : uint64_t{128}; };
  return {{64, u(s.rows), u(s.head_dim / 64), u(s.heads), u(s.batch)},
          {2, step(s.rows, s.row_stride), 128, step(s.heads, s.head_stride), step(s.batch, s.batch_stride)},
          {64, static_cast<uint32_t>(s.box_rows), static_cast<uint32_t>(s.head_dim / 64), 1, 1}};
}
}  // namespace detail

#if defined(__CUDACC__)

// A CUDA error code, 0 when the map is ready. The encoder is looked up in the driver at run time: nothing
// links libcuda, so the extension loads where there is no driver.
inline int encode_tensor_map(TensorMap* map, const TileSource& source) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode encode = nullptr;
  if (encode == nullptr) {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &symbol, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess || symbol == nullptr) return cudaErrorSymbolNotFound;
    encode = reinterpret_cast<Encode>(symbol);
  }
  const detail::Rank5 r = detail::rank5(source);
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, source.fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
             const_cast<void*>(source.data), r.size, r.stride_bytes + 1, r.box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#else

inline int encode_tensor_map(TensorMap* map, const TileSource& source) {
  const detail::Rank5 r = detail::rank5(source);
  map->base = static_cast<char*>(const_cast<void*>(source.data));
  map->element_bytes = 2;
  map->swizzle_bytes = kSwizzleBytes;
  for (int i = 0; i < 5; ++i) {
    map->size[i] = r.size[i];
    map->stride_bytes[i] = r.stride_bytes[i];
    map->box[i] = r.box[i];
  }
  return 0;
}

#endif

}  // namespace rf::arch
