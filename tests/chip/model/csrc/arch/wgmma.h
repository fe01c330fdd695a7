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

namespace rf::arch {

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

}  // namespace rf::arch
