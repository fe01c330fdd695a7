// Warpgroup matrix multiply: D[64, N] += A[64, 16] B[16, N], fp32 accumulators in registers, asynchronous.
//
// Register layout of D (and, pairwise, of A): thread t of the warpgroup holds rows (t / 32) * 16 + (t % 32) /
// 4 and the same + 8; element i is of row (i >> 1) & 1, column (i / 4) * 8 + (t % 4) * 2 + (i & 1). Two
// neighbouring accumulator elements packed to 16 bits are one register of an A operand: P goes from softmax
// to the next product without leaving the thread.
#pragma once

#include <type_traits>
#include <utility>

#include "csrc/arch/operand.h"
#include "csrc/arch/platform.h"

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

namespace rf::arch {

namespace detail {
namespace gmma = cute::SM90::GMMA;
template <class Element, int N>
struct Atoms;  // the shapes that this library instantiates
#define RF_WGMMA_ATOMS(Element, N, Name)                                                    \
  template <>                                                                               \
  struct Atoms<Element, N> {                                                                \
    using SS = gmma::MMA_64x##N##x16_F32##Name##Name##_SS<gmma::Major::K, gmma::Major::K>;  \
    using RS = gmma::MMA_64x##N##x16_F32##Name##Name##_RS<gmma::Major::K, gmma::Major::MN>; \
  };
RF_WGMMA_ATOMS(bf16, 64, BF16)
RF_WGMMA_ATOMS(bf16, 128, BF16)
RF_WGMMA_ATOMS(bf16, 176, BF16)
RF_WGMMA_ATOMS(f16, 64, F16)
RF_WGMMA_ATOMS(f16, 128, F16)
RF_WGMMA_ATOMS(f16, 176, F16)
#undef RF_WGMMA_ATOMS

template <class Atom, int kCount, size_t... I>
RF_DEVICE void wgmma_ss(float (&d)[kCount], uint64_t a, uint64_t b, gmma::ScaleOut scale,
                        std::index_sequence<I...>) {
  Atom::fma(a, b, d[I]..., scale);
}
template <class Atom, int kCount, size_t... I>
RF_DEVICE void wgmma_rs(float (&d)[kCount], const uint32_t* a, uint64_t b, std::index_sequence<I...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, d[I]..., gmma::ScaleOut::One);
}
}  // namespace detail

// D = A B (accumulate false) or D += A B; A and B in shared memory, both K-major.
template <class Element, int kCount>
RF_DEVICE void wgmma_ss(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  detail::wgmma_ss<typename detail::Atoms<Element, 2 * kCount>::SS>(
      d, a, b, accumulate ? detail::gmma::ScaleOut::One : detail::gmma::ScaleOut::Zero,
      std::make_index_sequence<kCount>());
}
// D += A B; A in registers, B in shared memory, MN-major.
template <class Element, int kCount>
RF_DEVICE void wgmma_rs(float (&d)[kCount], const uint32_t* a, uint64_t b) {
  detail::wgmma_rs<typename detail::Atoms<Element, 2 * kCount>::RS>(d, a, b,
                                                                    std::make_index_sequence<kCount>());
}

// Before the first wgmma that reads registers (accumulators, A) which ordinary instructions have touched.
RF_DEVICE void wgmma_fence() {
  cute::warpgroup_arrive();
}
RF_DEVICE void wgmma_commit() {
  cute::warpgroup_commit_batch();
}
// At most kPending committed groups are still in flight. Covers the rows of the waiting warp only.
template <int kPending>
RF_DEVICE void wgmma_wait() {
  cute::warpgroup_wait<kPending>();
}

// The compiler may move ordinary reads and writes of registers across the asynchronous product; this stops
// it.
template <class T, int kCount>
RF_DEVICE void pin_registers(T (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>)
      asm volatile("" : "+f"(d[i])::"memory");
    else
      asm volatile("" : "+r"(d[i])::"memory");
  }
}

}  // namespace rf::arch
