// Threads, warps and barriers of a CTA; register hand-over between warpgroups; shared memory and its proxies.
#pragma once

#include "csrc/arch/platform.h"

#if defined(__CUDACC__)
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/util.hpp>
#endif

namespace rf::arch {

#if defined(__CUDACC__)

RF_DEVICE int thread_index() {
  return threadIdx.x;
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

// Ordinary (generic proxy) writes of this thread to shared memory become visible to TMA and wgmma.
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

#else  // the functional model

RF_DEVICE int thread_index() {
  return chip::thread_index();
}
RF_DEVICE int thread_index_again() {
  return chip::thread_index();
}
RF_DEVICE int warp_uniform(int x) {
  return static_cast<int>(chip::shuffle(static_cast<uint32_t>(x), 0));
}
RF_DEVICE bool elect_one() {
  return chip::thread_index() % kWarpThreads == 0;
}

RF_DEVICE char* shared_memory() {
  return chip::shared_memory();
}
RF_DEVICE uint32_t shared_address(const void* p) {
  return chip::shared_address(p);
}

RF_DEVICE void sync_cta() {
  chip::sync_cta();
}
RF_DEVICE void sync_warp() {
  chip::sync_warp();
}
RF_DEVICE void named_barrier_sync(int id, int threads) {
  chip::named_barrier(id, threads, true);
}
RF_DEVICE void named_barrier_arrive(int id, int threads) {
  chip::named_barrier(id, threads, false);
}

RF_DEVICE uint32_t shuffle_xor(uint32_t v, int lane_mask) {
  return chip::shuffle(v, (chip::thread_index() % kWarpThreads) ^ lane_mask);
}
RF_DEVICE float shuffle_xor(float v, int lane_mask) {
  return bits_to_float(shuffle_xor(float_to_bits(v), lane_mask));
}

template <int kRegisters>
RF_DEVICE void decrease_registers() {
  chip::set_registers(kRegisters, false);
}
template <int kRegisters>
RF_DEVICE void increase_registers() {
  chip::set_registers(kRegisters, true);
}

RF_DEVICE void fence_proxy_async_shared() {
  chip::fence_proxy_async_shared();
}
RF_DEVICE void order_before(float) {}

#endif

}  // namespace rf::arch
