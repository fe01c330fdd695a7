#include "tests/chip/probes.h"

#include <cstring>
#include <map>

#include "csrc/arch/mbarrier.h"
#include "csrc/arch/sync.h"
#include "csrc/arch/tensor_map.h"
#include "csrc/arch/tma.h"
#include "csrc/arch/vec.h"
#include "csrc/arch/wgmma.h"
#include "tests/chip/model/layouts.h"

namespace chip_tests {

using namespace rf::arch;
using rf::bf16;

namespace {

constexpr int kTile = 64 * 128;  // bytes of a 64 x 64 tile

struct Smem {
  alignas(1024) char a[kTile];
  alignas(1024) char b[kTile];
  alignas(1024) char d[kTile];
  uint64_t full, other;
};

struct Context {
  TensorMap map_in, map_out;  // [1, 128, 1, 64] and [1, 64, 1, 64], boxes of 64 rows
  const uint16_t* in;
  uint16_t* out;
  bool fault;
};

Smem& smem() {
  return *reinterpret_cast<Smem*>(shared_memory());
}

void init_barriers(bool fence = true) {
  if (thread_index() == 0) {
    mbarrier_init(&smem().full, 1);
    mbarrier_init(&smem().other, 2);
    if (fence) fence_mbarrier_init();
  }
  sync_cta();
}
void load_tile(const Context& c, char* tile, int row) {
  tma_load<L2Hint::evict_first>(&c.map_in, &smem().full, tile, {{0, row, 0, 0, 0}});
}
void load_both(const Context& c) {
  if (thread_index() == 0) {
    mbarrier_arrive_expect(&smem().full, 2 * kTile);
    load_tile(c, smem().a, 0);
    load_tile(c, smem().b, 64);
  }
  mbarrier_wait(&smem().full, 0);
}
void multiply(float (&d)[32]) {  // D = A B^T
  pin_registers(d);
  wgmma_fence();
  const OperandDesc a = operand_k_major(shared_address(smem().a)),
                    b = operand_k_major(shared_address(smem().b));
  for (int i = 0; i < 4; ++i) wgmma_ss<bf16>(d, a.at(32 * i), b.at(32 * i), i != 0);
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(d);
}
void write_direct(const Context& c, const float (&d)[32]) {
  const int t = thread_index();
  for (int r = 0; r < 2; ++r)
    for (int block = 0; block < 8; ++block) {
      const int row = t / 32 * 16 + t % 32 / 4 + 8 * r;
      float pair;
      const uint32_t packed = pack2<bf16>(d[4 * block + 2 * r], d[4 * block + 2 * r + 1]);
      std::memcpy(&pair, &packed, 4);
      global_store(reinterpret_cast<float*>(c.out + row * 64 + block * 8 + t % 4 * 2), pair);
    }
}

// wgmma -> stmatrix into a swizzled tile -> TMA store. The fault: no proxy fence between them.
void store_through_shared(const Context& c) {
  init_barriers();
  load_both(c);
  float d[32] = {};
  multiply(d);
  const int t = thread_index(), lane = t % 32, warp = t / 32;
  for (int half = 0; half < 2; ++half)  // 16 rows x 32 columns of the warp: four 8 x 8 matrices, twice
    for (int group = 0; group < 2; ++group) {
      const int matrix = lane / 8, row = warp * 16 + half * 8 + lane % 8, chunk = group * 4 + matrix;
      char* at = smem().d + chip::swizzle(row * 128 + chunk * 16, 128);
      uint32_t v[4];
      for (int i = 0; i < 4; ++i) {
        const float* e = d + 4 * (group * 4 + i) + 2 * half;
        v[i] = pack2<bf16>(e[0], e[1]);
      }
      store_matrix_x4(at, v);
    }
  if (!c.fault) fence_proxy_async_shared();
  sync_cta();
  if (t == 0) {
    tma_store(&c.map_out, smem().d, {{0, 0, 0, 0, 0}});
    tma_store_commit();
    tma_store_wait<0>();
  }
}

// Operand A comes into shared memory by ordinary stores. The fault: no proxy fence before wgmma.
void operand_by_threads(const Context& c) {
  init_barriers();
  if (thread_index() == 0) {
    mbarrier_arrive_expect(&smem().full, kTile);
    load_tile(c, smem().b, 64);
  }
  mbarrier_wait(&smem().full, 0);
  for (int chunk = thread_index(); chunk < 64 * 8; chunk += 128) {
    uint32_t v[4];
    std::memcpy(v, c.in + chunk * 8, 16);
    for (uint32_t& x : v) x ^= 0x80008000u;  // -A
    shared_store(smem().a + chip::swizzle(chunk * 16, 128), v);
  }
  if (!c.fault) fence_proxy_async_shared();
  sync_cta();
  float d[32] = {};
  multiply(d);
  write_direct(c, d);
}

// ---- misuse: each of these must be reported
void over_arrival(const Context&) {
  init_barriers();
  if (thread_index() == 0) {
    mbarrier_arrive_expect(&smem().full, 128);  // its one arrival; the phase waits for the bytes
    mbarrier_arrive(&smem().full);
  }
}
void unpublished_barrier(const Context& c) {
  init_barriers(false);
  load_both(c);
}
void expect_too_little(
    const Context& c) {  // completes on the first part: the wait passes, the tile is not there yet
  init_barriers();
  if (thread_index() == 0) {
    mbarrier_arrive_expect(&smem().full, kTile - 128);
    load_tile(c, smem().a, 0);
  }
  mbarrier_wait(&smem().full, 0);
}
void misaligned_tile(const Context& c) {
  init_barriers();
  if (thread_index() == 0) {
    mbarrier_arrive_expect(&smem().full, kTile);
    load_tile(c, smem().a + 128, 0);
  }
}
void tile_over_barrier(const Context& c) {
  init_barriers();
  if (thread_index() == 0) {
    mbarrier_arrive_expect(&smem().full, kTile);
    load_tile(c, reinterpret_cast<char*>(&smem().full), 0);
  }
}
void exit_before_landing(const Context& c) {
  init_barriers();
  if (thread_index() == 0) {
    mbarrier_arrive_expect(&smem().full, kTile);
    load_tile(c, smem().a, 0);
  }
}
void no_wgmma_fence(const Context& c) {
  init_barriers();
  load_both(c);
  float d[32] = {};
  wgmma_ss<bf16>(d, operand_k_major(shared_address(smem().a)).at(0),
                 operand_k_major(shared_address(smem().b)).at(0), false);
}
void divergent_descriptor(const Context& c) {
  init_barriers();
  load_both(c);
  float d[32] = {};
  wgmma_fence();
  const uint32_t step = thread_index() == 77 ? 32 : 0;
  wgmma_ss<bf16>(d, operand_k_major(shared_address(smem().a)).at(step),
                 operand_k_major(shared_address(smem().b)).at(0), false);
}
void accumulator_touched(const Context& c) {
  init_barriers();
  load_both(c);
  float d[32] = {};
  wgmma_fence();
  wgmma_ss<bf16>(d, operand_k_major(shared_address(smem().a)).at(0),
                 operand_k_major(shared_address(smem().b)).at(0), false);
  wgmma_commit();
  d[3] = 1.f;
  wgmma_wait<0>();
}
void exit_with_wgmma(const Context& c) {
  init_barriers();
  load_both(c);
  float d[32] = {};
  wgmma_fence();
  wgmma_ss<bf16>(d, operand_k_major(shared_address(smem().a)).at(0),
                 operand_k_major(shared_address(smem().b)).at(0), false);
  wgmma_commit();
}
void store_out_of_bounds(const Context& c) {
  global_store(c.out + 64 * 64, {0, 0, 0, 0});
}
void misaligned_store(const Context& c) {
  global_store(c.out + 4, {0, 0, 0, 0});
}
void unordered_writers(const Context& c) {
  if (thread_index() < 2) global_store(c.out, {0, 0, 0, 0});
}
void barrier_two_counts(const Context&) {
  named_barrier_arrive(1, thread_index() < 64 ? 128 : 256);
}
void registers_missing(const Context&) {
  increase_registers<240>();
}
void nobody_arrives(const Context&) {
  init_barriers();
  mbarrier_wait(&smem().other, 0);
}
// ---- release and acquire, between two CTAs
// ----------------------------------------------------------------------------------- CTA 0 hands 16 bytes
// per thread of a warp to CTA 1 through a flag. `fault`: without the warp barrier before the release.
void hand_over(const Context& c) {
  auto* flag = reinterpret_cast<uint32_t*>(c.out + 2048);
  auto* counter = flag + 1;
  auto* data = reinterpret_cast<float*>(c.out);
  if (thread_index() >= kWarpThreads) return;
  uint32_t ticket = 0;
  if (thread_index() == 0) ticket = take_ticket(counter);
  ticket = warp_uniform(static_cast<int>(ticket));
  const int lane = thread_index();
  if (ticket == 0) {
    const float v[4] = {1.f * lane, 2.f, 3.f, 4.f};
    partial_store(data + 4 * lane, v);
    if (!c.fault) sync_warp();
    if (elect_one()) flag_signal(flag);
  } else {
    flag_wait(flag);
    float v[4];
    partial_load(data + 4 * lane, v);
    for (float& x : v) x += 1.f;
    partial_store(data + 128 + 4 * lane, v);
  }
}

struct Probe {
  void (*kernel)(const Context&);
  int ctas = 1;
};
const std::map<std::string, Probe> kProbes = {
    {"store_through_shared", {store_through_shared}},
    {"operand_by_threads", {operand_by_threads}},
    {"hand_over", {hand_over, 2}},
    {"over_arrival", {over_arrival}},
    {"unpublished_barrier", {unpublished_barrier}},
    {"expect_too_little", {expect_too_little}},
    {"misaligned_tile", {misaligned_tile}},
    {"tile_over_barrier", {tile_over_barrier}},
    {"exit_before_landing", {exit_before_landing}},
    {"no_wgmma_fence", {no_wgmma_fence}},
    {"divergent_descriptor", {divergent_descriptor}},
    {"accumulator_touched", {accumulator_touched}},
    {"exit_with_wgmma", {exit_with_wgmma}},
    {"store_out_of_bounds", {store_out_of_bounds}},
    {"misaligned_store", {misaligned_store}},
    {"unordered_writers", {unordered_writers}},
    {"barrier_two_counts", {barrier_two_counts}},
    {"registers_missing", {registers_missing}},
    {"nobody_arrives", {nobody_arrives}},
};

}  // namespace

chip::LaunchStats run_probe(const std::string& name, const uint16_t* in, uint16_t* out, bool fault,
                            chip::LaunchOptions& o) {
  Context c{{}, {}, in, out, fault};
  encode_tensor_map(&c.map_in, {in, 1, 128, 1, 64, 128 * 64, 64, 64, 64, false});
  encode_tensor_map(&c.map_out, {out, 1, 64, 1, 64, 64 * 64, 64, 64, 64, false});
  const Probe& probe = kProbes.at(name);
  o.grid = probe.ctas;
  o.threads = 128;
  o.registers_per_thread = 168;
  o.shared_bytes = sizeof(Smem);
  o.shared_names = {{"full", offsetof(Smem, full), 8, 1}, {"other", offsetof(Smem, other), 8, 1}};
  return chip::launch(o, [&] { probe.kernel(c); });
}

uint64_t operand_desc(bool mn_major, uint32_t address, uint32_t block_bytes, uint32_t step_bytes) {
  return (mn_major ? operand_mn_major(address, block_bytes) : operand_k_major(address)).at(step_bytes);
}

}  // namespace chip_tests
