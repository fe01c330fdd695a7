// Threads, warps and barriers of a CTA; register hand-over between warpgroups; shared memory and its proxies.
#pragma once

#include "csrc/arch/platform.h"

namespace rf::arch {

RF_DEVICE int thread_index() {
  return chip::thread_index();
}
RF_DEVICE uint32_t block_index() {
  return static_cast<uint32_t>(chip::block_index());
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

RF_DEVICE bool any_in_warp(bool x) {
  return chip::any_in_warp(x);
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

}  // namespace rf::arch
