// Threads, warps and barriers of a CTA; register hand-over between warpgroups; shared memory.
#pragma once

#include "csrc/arch/platform.h"

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/util.hpp>

namespace rf::arch {

RF_DEVICE int thread_index() {
  return threadIdx.x;
}
RF_DEVICE uint32_t block_index() {
  return blockIdx.x;
}
// A read of %tid that is never merged with an earlier one: nothing computed from it can be hoisted above it.
RF_DEVICE int thread_index_again() {
  int t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return t;
}
// Tells the compiler that x is the same in the whole warp.
RF_DEVICE int warp_uniform(int x) {
  return __shfl_sync(~0u, x, 0);
}
RF_DEVICE bool elect_one() {
  return cute::elect_one_sync();
}

RF_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char smem[];
  return smem;
}
RF_DEVICE uint32_t shared_address(const void* p) {
  return cute::cast_smem_ptr_to_uint(p);
}

RF_DEVICE void sync_cta() {
  __syncthreads();
}
RF_DEVICE void sync_warp() {
  __syncwarp();
}
// `threads` counts those that arrive and those that wait. Give a constant id: with an id in a register ptxas
// reserves all 16 barriers for the kernel.
RF_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
RF_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// True in the whole warp when x is true in any lane of it. Every lane must come here.
RF_DEVICE bool any_in_warp(bool x) {
  return __any_sync(~0u, x);
}

RF_DEVICE uint32_t shuffle_xor(uint32_t v, int lane_mask) {
  return __shfl_xor_sync(~0u, v, lane_mask);
}
RF_DEVICE float shuffle_xor(float v, int lane_mask) {
  return __shfl_xor_sync(~0u, v, lane_mask);
}

// Executed by a whole warpgroup. An increase waits until other warpgroups have given enough away.
template <int kRegisters>
RF_DEVICE void decrease_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
RF_DEVICE void increase_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

// Makes this thread's ordinary stores to shared memory visible to TMA and wgmma.
RF_DEVICE void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Nothing that x depends on is scheduled below this point. ptxas moves a wgmma wait above the arithmetic in
// front of it, and empty asm statements do not reach ptxas; a predicated store that never happens (x >= 0)
// does, and it stays put.
RF_DEVICE void order_before(float x) {
  asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0; }" ::"f"(x), "r"(0)
               : "memory");
}

}  // namespace rf::arch
