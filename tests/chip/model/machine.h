// What a kernel sees of the functional model: the instructions that csrc/arch exposes, as plain calls.
//
// Deliberately free of heavy headers, and in a namespace of its own, so that many variants of a kernel
// (planted faults) compile quickly and link against one machine. How a grid is launched: launch.h. How it
// works: state.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace chip {

enum class Format { bf16, fp16 };

// A tiled tensor map, innermost dimension first; stride_bytes[0] is the element size.
struct TensorMap {
  char* base;
  uint32_t element_bytes, swizzle_bytes;
  uint64_t size[5], stride_bytes[5];
  uint32_t box[5];
};

int thread_index();
int block_index();
char* shared_memory();
uint32_t shared_address(const void* p);
void set_registers(int per_thread, bool increase);

void sync_cta();
void sync_warp();
void named_barrier(int id, int threads, bool wait);
uint32_t shuffle(uint32_t v, int source_lane);
bool any_in_warp(bool x);

void mbarrier_init(void* barrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(void* barrier, uint32_t expected_bytes);
void mbarrier_wait(void* barrier, uint32_t parity);

void tma_load(const TensorMap* map, void* barrier, void* smem, const int (&coord)[5]);
void tma_store(const TensorMap* map, const void* smem, const int (&coord)[5]);
void tma_store_commit();
void tma_store_wait(int pending);
void fence_proxy_async_shared();
void shared_store(void* p, const void* value, int bytes);

// d[n / 2] of this thread; A from shared memory (regs_a null) or from 4 registers.
void wgmma(Format format, int n, float* d, const uint32_t* regs_a, uint64_t desc_a, uint64_t desc_b,
           bool b_mn_major, bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

void global_store(void* p, const void* value, int bytes);
void global_load(const void* p, void* value, int bytes);
void flag_store(uint32_t* flag, uint32_t value, bool release);
void flag_wait(uint32_t* flag, bool acquire);
uint32_t atomic_add(uint32_t* counter, uint32_t x);

}  // namespace chip
