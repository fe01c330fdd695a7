// Warpgroup matrix multiply: D[64, N] += A[64, 16] B[16, N], fp32 accumulators in registers, asynchronous.
//
// Register layout of D (and, pairwise, of A): thread t of the warpgroup holds rows (t / 32) * 16 + (t % 32) /
// 4 and the same + 8; element i is of row (i >> 1) & 1, column (i / 4) * 8 + (t % 4) * 2 + (i & 1). Two
// neighbouring accumulator elements packed to 16 bits are one register of an A operand: P goes from softmax
// to the next product without leaving the thread.
#pragma once

#include <type_traits>
#include <utility>

#include "csrc/arch/platform.h"

#if defined(__CUDACC__)
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#endif

namespace rf::arch {

// Shared-memory descriptor of a 16-bit operand under SWIZZLE_128B (64 elements = one row of 128 bytes, 8-row
// groups of 1,024 bytes, tile 1,024-byte aligned). The high word is a constant and shared addresses end below
// 256 KiB, so a step inside a tile is one addition to the low word, without carry.
struct OperandDesc {
  uint32_t lo;

  static constexpr uint32_t kHi =
      (kSwizzleAtomBytes >> 4) | (1u << 30);  // stride between 8-row groups, SWIZZLE_128B

  RF_DEVICE uint64_t at(uint32_t step_bytes) const {
    return static_cast<uint64_t>(kHi) << 32 | (lo + (step_bytes >> 4));
  }
};

// K-major (Q and K): a step of 16 along k inside the 128-byte row is 32 bytes; the leading offset is unused.
RF_DEVICE OperandDesc operand_k_major(uint32_t shared_address) {
  return {(shared_address >> 4) | (1u << 16)};
}
// MN-major (V): `block_bytes` is the distance of neighbouring 64-wide column blocks; a step of 16 along k is
// 2,048 bytes.
RF_DEVICE OperandDesc operand_mn_major(uint32_t shared_address, uint32_t block_bytes) {
  return {(shared_address >> 4) | ((block_bytes >> 4) << 16)};
}

#if defined(__CUDACC__)

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

#else

namespace detail {
template <class Element>
constexpr chip::Format kFormat = std::is_same_v<Element, bf16> ? chip::Format::bf16 : chip::Format::fp16;
}

template <class Element, int kCount>
RF_DEVICE void wgmma_ss(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  chip::wgmma(detail::kFormat<Element>, 2 * kCount, d, nullptr, a, b, /*b_mn_major=*/false, accumulate);
}
template <class Element, int kCount>
RF_DEVICE void wgmma_rs(float (&d)[kCount], const uint32_t* a, uint64_t b) {
  chip::wgmma(detail::kFormat<Element>, 2 * kCount, d, a, 0, b, /*b_mn_major=*/true, true);
}
RF_DEVICE void wgmma_fence() {
  chip::wgmma_fence();
}
RF_DEVICE void wgmma_commit() {
  chip::wgmma_commit();
}
template <int kPending>
RF_DEVICE void wgmma_wait() {
  chip::wgmma_wait(kPending);
}
// The model keeps in-flight registers in memory that it poisons: calls into it are barriers enough.
template <class T, int kCount>
RF_DEVICE void pin_registers(T (&)[kCount]) {}

#endif

}  // namespace rf::arch
