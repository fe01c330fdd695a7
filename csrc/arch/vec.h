// Packing to 16 bits, 16-byte accesses, and the global flags of a merge between CTAs.
#pragma once

#include <type_traits>

#include "csrc/arch/platform.h"
#include "csrc/arch/sync.h"

namespace rf::arch {

// Two floats, rounded to nearest even, in one register: lo in the low half.
template <class Element>
RF_DEVICE uint32_t pack2(float lo, float hi) {
  uint32_t y;
  if constexpr (std::is_same_v<Element, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

// ---- results. PTX, because a uint4 store through a pointer came out as four 32-bit stores.
RF_DEVICE void global_store(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}
RF_DEVICE void global_store(float* p, float v) {
  *p = v;
}
RF_DEVICE void shared_store(void* p, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// Of memory that nobody writes while the kernel runs.
RF_DEVICE int32_t global_load(const int32_t* p) {
  return __ldg(p);
}
RF_DEVICE float global_load(const float* p) {
  return __ldg(p);
}
RF_DEVICE void global_load(const float* p, float (&v)[2]) {
  const float2 pair = __ldg(reinterpret_cast<const float2*>(p));
  v[0] = pair.x;
  v[1] = pair.y;
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
// Executed by a whole warp, which leaves together: a spin that each lane could leave on its own makes ptxas
// take everything around it for divergent, the main loop too, and keep every address out of the uniform
// registers.
RF_DEVICE void flag_wait(uint32_t* flag) {
  uint32_t x;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  } while (any_in_warp(x == 0));
}
// 0, 1, ... in the order of asking.
RF_DEVICE uint32_t take_ticket(uint32_t* counter) {
  return atomicAdd(counter, 1u);
}

}  // namespace rf::arch
