// What lets one function body serve g++ and nvcc: csrc/math holds the arithmetic that the CPU and the GPU
// share.
#pragma once

#if defined(__CUDACC__)
#define RF_HD __host__ __device__ __forceinline__
#else
#define RF_HD inline __attribute__((always_inline))
#endif
