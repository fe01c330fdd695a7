// N neighbouring elements that move together: one 16-byte access per 16 bytes on the GPU, where `p` must then
// be aligned to min(16, N * sizeof(T)); the host has no such requirement.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "csrc/math/dtype.h"

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

#if defined(__CUDA_ARCH__)
// Each 16 bytes of a vector, by a store of the caller's.
template <int N, typename T, typename Store>
__device__ __forceinline__ void store_by_16(T* p, const Vec<T, N>& value, Store store) {
  RF_UNROLL
  for (size_t i = 0; i < sizeof(value) / 16; ++i) {
    uint4 raw;
    memcpy(&raw, reinterpret_cast<const char*>(&value) + 16 * i, 16);
    store(reinterpret_cast<uint4*>(p) + i, raw);
  }
}
#endif

template <int N, typename T>
RF_HD void store_vec(T* p, const Vec<T, N>& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(value) % 16 == 0) {
    return store_by_16(p, value, [](uint4* to, uint4 raw) { *to = raw; });
  }
#endif
  check_access(p, sizeof(value));
  for (int e = 0; e < N; ++e) p[e] = value.v[e];
}

// The same to global memory alone, by an instruction: in reach of a branch with another store, nvcc would
// split a plain 16-byte one into words.
template <int N, typename T>
RF_HD void store_global(T* p, const Vec<T, N>& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(value) % 16 == 0) {
    return store_by_16(p, value, [](uint4* to, uint4 raw) { __stwb(to, raw); });
  }
#endif
  store_vec(p, value);
}

// The same where `active`: under a predicate, not a branch.
template <int N, typename T>
RF_HD void store_global_if(bool active, T* p, const Vec<T, N>& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(value) % 16 == 0) {
    return store_by_16(p, value, [active](uint4* to, uint4 raw) {
      asm volatile(
          "{ .reg .pred q; setp.ne.u32 q, %0, 0; @q st.global.wb.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(
              static_cast<uint32_t>(active)),
          "l"(__cvta_generic_to_global(to)), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
          : "memory");
    });
  }
#endif
  if (active) store_vec(p, value);
}

// Whether all are finite. Half precision two at a time: of an exponent of ones, one more is a carry into the
// sign's place.
template <typename T, int N>
RF_HD bool all_finite(const Vec<T, N>& x) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x7F807F80u : 0x7C007C00u;
    constexpr uint32_t kOne = std::is_same_v<T, bf16> ? 0x00800080u : 0x04000400u;
    uint32_t carries = 0;
    RF_UNROLL
    for (int e = 0; e < N; e += 2) {
      uint32_t pair;
      memcpy(&pair, &x.v[e], sizeof(pair));
      carries |= (pair & kOnes) + kOne;
    }
    return (carries & 0x80008000u) == 0;
  } else {
    bool finite = true;
    RF_UNROLL
    for (int e = 0; e < N; ++e) finite = finite && is_finite(to_acc(x.v[e]));
    return finite;
  }
}

// Widened: on the GPU an instruction for each bf16 (of its struct nvcc makes two for every upper half).
template <typename T, int N, typename A>
RF_HD void vec_to_acc(const Vec<T, N>& x, A (&out)[N]) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    RF_UNROLL
    for (int e = 0; e < N; e += 2) {
      uint32_t pair;
      memcpy(&pair, &x.v[e], sizeof(pair));
      out[e] = bits_to_float(pair << 16);
      out[e + 1] = bits_to_float(pair & 0xFFFF0000u);
    }
  } else
#endif
  {
    RF_UNROLL
    for (int e = 0; e < N; ++e) out[e] = to_acc(x.v[e]);
  }
}

// Accumulators rounded to T: on the GPU two to an instruction (cvt.rn.bf16x2, cvt.rn.f16x2) for half
// precision.
template <typename T, int N, typename A>
RF_HD Vec<T, N> vec_from_acc(const A (&x)[N]) {
  Vec<T, N> out;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    RF_UNROLL
    for (int e = 0; e < N; e += 2) {
      uint32_t pair;
      if constexpr (std::is_same_v<T, bf16>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x[e + 1]), "f"(x[e]));
      else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(x[e + 1]), "f"(x[e]));
      memcpy(&out.v[e], &pair, sizeof(pair));
    }
  } else
#endif
  {
    RF_UNROLL
    for (int e = 0; e < N; ++e) out.v[e] = from_acc<T>(x[e]);
  }
  return out;
}

// The sums, each rounded to T. In half precision the GPU adds two to an instruction: rounded once, which
// gives what the sum in float32 and then rounded gives (24 bits are twice the 11 of fp16 and two more).
template <typename T, int N>
RF_HD Vec<T, N> vec_add(const Vec<T, N>& x, const Vec<T, N>& y) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    Vec<T, N> out;
    RF_UNROLL
    for (int e = 0; e < N; e += 2) {
      uint32_t a, b, sum;
      memcpy(&a, &x.v[e], sizeof(a));
      memcpy(&b, &y.v[e], sizeof(b));
      if constexpr (std::is_same_v<T, bf16>)  // sm_80 has no addition, but x * 1 + y
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
      else
        asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
      memcpy(&out.v[e], &sum, sizeof(sum));
    }
    return out;
  } else
#endif
  {
    acc_t<T> a[N], b[N];
    vec_to_acc(x, a);
    vec_to_acc(y, b);
    RF_UNROLL
    for (int e = 0; e < N; ++e) a[e] = add_rn(a[e], b[e]);
    return vec_from_acc<T>(a);
  }
}

}  // namespace rf
