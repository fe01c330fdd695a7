// Host side of TMA: describing a strided [B, T, H, D] tensor of 16-bit elements to the copy engine.
#pragma once

#include "csrc/arch/platform.h"
#include "csrc/arch/tile.h"

#include <cuda_runtime.h>

#include <atomic>

namespace rf::arch {

// What became of an encoding: at most one of the codes is not 0, and `call` is where it came from.
struct Encoded {
  int runtime;  // cudaError_t
  int driver;   // CUresult
  const char* call;
};

// The encoder is looked up in the driver at run time: nothing links libcuda, so the extension loads where
// there is no driver.
inline Encoded encode_tensor_map(TensorMap* map, const TileSource& source) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static std::atomic<Encode> known = nullptr;
  Encode encode = known.load();
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
    constexpr const char* kLookUp = "looking up cuTensorMapEncodeTiled in the driver";
    if (error != cudaSuccess) return {error, 0, kLookUp};
    if (found != cudaDriverEntryPointSuccess || symbol == nullptr)
      return {cudaErrorSymbolNotFound, 0, kLookUp};
    known = encode = reinterpret_cast<Encode>(symbol);
  }
  const detail::Rank5 r = detail::rank5(source);
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, source.fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
             const_cast<void*>(source.data), r.size, r.stride_bytes + 1, r.box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return {0, result, "cuTensorMapEncodeTiled"};
}

}  // namespace rf::arch
