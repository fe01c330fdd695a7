// Packing to 16 bits, 16-byte accesses, stmatrix, and the global flags of a merge between CTAs.
#pragma once

#include <type_traits>

#include "csrc/arch/platform.h"
#include "csrc/arch/sync.h"

namespace rf::arch {

// Two floats, rounded to nearest even, in one register: lo in the low half.
template <class Element>
RF_DEVICE uint32_t pack2(float lo, float hi) {
#if defined(__CUDACC__)
  uint32_t y;
  if constexpr (std::is_same_v<Element, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
#else
  return from_acc<Element>(lo).bits | static_cast<uint32_t>(from_acc<Element>(hi).bits) << 16;
#endif
}

#if defined(__CUDACC__)

// ---- results. PTX, because a uint4 store through a pointer came out as four 32-bit stores.
RF_DEVICE void global_store(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
RF_DEVICE void global_store(float* p, float v) {
  *p = v;
}

// ---- partial results between CTAs: through the L2 only (no stale L1 lines), ordered by a flag
RF_DEVICE void partial_store(float* p, const float* v) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v[0]), "f"(v[1]), "f"(v[2]),
               "f"(v[3])
               : "memory");
}
RF_DEVICE void partial_load(const float* p, float* v) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(p)
               : "memory");
}

// Release: all that this thread wrote, and all that sync_warp ordered before it, is visible to whoever
// acquires.
RF_DEVICE void flag_signal(uint32_t* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
RF_DEVICE void flag_wait(uint32_t* flag) {
  uint32_t x;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  } while (x == 0);
}
RF_DEVICE void flag_clear(uint32_t* flag) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory");
}
// 0, 1, ... count - 1 in the order of asking, then 0 again: ready for the next launch without a memset.
RF_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t count) {
  return atomicInc(counter, count - 1);
}

// ---- ordinary (generic proxy) shared memory
RF_DEVICE void shared_store(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and holds in
// v[i] the elements (l / 4, 2 * (l % 4)) and the next of matrix i.
RF_DEVICE void store_matrix_x4(void* row, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

#else

RF_DEVICE void global_store(void* p, const uint32_t (&v)[4]) {
  chip::global_store(p, v, 16);
}
RF_DEVICE void global_store(float* p, float v) {
  chip::global_store(p, &v, 4);
}
RF_DEVICE void partial_store(float* p, const float* v) {
  chip::global_store(p, v, 16);
}
RF_DEVICE void partial_load(const float* p, float* v) {
  chip::global_load(p, v, 16);
}
RF_DEVICE void flag_signal(uint32_t* flag) {
  chip::flag_store(flag, 1, /*release=*/true);
}
RF_DEVICE void flag_wait(uint32_t* flag) {
  chip::flag_wait(flag, /*acquire=*/true);
}
RF_DEVICE void flag_clear(uint32_t* flag) {
  chip::flag_store(flag, 0, /*release=*/false);
}
RF_DEVICE uint32_t take_ticket(uint32_t* counter, uint32_t count) {
  return chip::atomic_inc(counter, count - 1);
}
RF_DEVICE void shared_store(void* p, const uint32_t (&v)[4]) {
  chip::shared_store(p, v, 16);
}
RF_DEVICE void store_matrix_x4(void* row, const uint32_t (&v)[4]) {
  const int lane = chip::thread_index() % kWarpThreads;
  const uint32_t base = shared_address(shared_memory());
  for (int i = 0; i < 4; ++i) {
    const uint32_t address = chip::shuffle(shared_address(row), 8 * i + lane / 4);
    chip::shared_store(shared_memory() + (address - base) + 4 * (lane % 4), &v[i], 4);
  }
}

#endif

}  // namespace rf::arch
