// N neighbouring elements that move together: one 16-byte access per 16 bytes on the GPU, where `p` must then
// be aligned to min(16, N * sizeof(T)); the host has no such requirement.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "csrc/math/host_device.h"

// RF_UNROLL: before a loop over the elements of a Vec; on the GPU its arrays must become registers.
// RF_NO_UNROLL: before a loop whose length is data and usually 1; nvcc would unroll it by four and spill.
#if defined(__CUDACC__)
#define RF_UNROLL _Pragma("unroll")
#define RF_NO_UNROLL _Pragma("unroll 1")
#else
#define RF_UNROLL _Pragma("GCC unroll 1")
#define RF_NO_UNROLL
#endif

namespace rf {

// Host tests of a kernel's body define RF_TRAP_MISALIGNED: an access that would fault on the GPU then stops
// them, and what the accesses move is counted.
#if defined(RF_TRAP_MISALIGNED) && !defined(__CUDACC__)
inline int64_t moved_bytes = 0;
#endif
RF_HD void check_access([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(RF_TRAP_MISALIGNED) && !defined(__CUDACC__)
  if (bytes % 16 == 0 && reinterpret_cast<uintptr_t>(p) % 16 != 0) __builtin_trap();
  moved_bytes += static_cast<int64_t>(bytes);
#endif
}

template <typename T, int N>
struct Vec {
  T v[N];
};

template <int N, typename T>
RF_HD Vec<T, N> load_vec(const T* p) {
  Vec<T, N> out;
#if defined(__CUDA_ARCH__)
  // Through uint4: of a struct of eight 2-byte members nvcc would make two 8-byte accesses.
  if constexpr (sizeof(out) % 16 == 0) {
    RF_UNROLL
    for (size_t i = 0; i < sizeof(out) / 16; ++i) {
      const uint4 raw = reinterpret_cast<const uint4*>(p)[i];
      memcpy(reinterpret_cast<char*>(&out) + 16 * i, &raw, 16);
    }
    return out;
  }
#endif
  check_access(p, sizeof(out));
  for (int e = 0; e < N; ++e) out.v[e] = p[e];
  return out;
}

template <int N, typename T>
RF_HD void store_vec(T* p, const Vec<T, N>& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(value) % 16 == 0) {
    RF_UNROLL
    for (size_t i = 0; i < sizeof(value) / 16; ++i) {
      uint4 raw;
      memcpy(&raw, reinterpret_cast<const char*>(&value) + 16 * i, 16);
      reinterpret_cast<uint4*>(p)[i] = raw;
    }
    return;
  }
#endif
  check_access(p, sizeof(value));
  for (int e = 0; e < N; ++e) p[e] = value.v[e];
}

}  // namespace rf
