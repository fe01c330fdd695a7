// Packing to 16 bits, 16-byte accesses, stmatrix, and the global flags of a merge between CTAs.
#pragma once

#include <type_traits>

#include "csrc/arch/platform.h"
#include "csrc/arch/sync.h"

namespace rf::arch {

// Two floats, rounded to nearest even, in one register: lo in the low half.
template <class Element>
RF_DEVICE uint32_t pack2(float lo, float hi) {
  return from_acc<Element>(lo).bits | static_cast<uint32_t>(from_acc<Element>(hi).bits) << 16;
}

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
  chip::any_in_warp(false);  // the vote that ends the spin
}
RF_DEVICE uint32_t take_ticket(uint32_t* counter) {
  return chip::atomic_add(counter, 1);
}
RF_DEVICE float global_load(const float* p) {
  float v;
  chip::global_load(p, &v, 4);
  return v;
}
RF_DEVICE void global_load(const float* p, float (&v)[2]) {
  chip::global_load(p, v, 8);
}
RF_DEVICE int32_t global_load(const int32_t* p) {
  int32_t v;
  chip::global_load(p, &v, 4);
  return v;
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

}  // namespace rf::arch
