// Inside the functional model: fibers, CTAs, barriers, shared and global memory. Only the model's own .cpp
// files and its tests include this.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "tests/chip/model/launch.h"
#include "tests/chip/model/machine.h"

namespace chip {

constexpr int kWarp = 32, kWarpgroup = 128;

// A global store that other threads may not see yet.
struct PendingStore {
  uintptr_t address;
  int bytes;
  unsigned char data[16];
};
struct SharedRange {
  uint32_t offset, bytes;
};

// An accumulator between issue and wait: the values live in `values`, the program sees NaN.
struct InFlight {
  float* registers;
  std::vector<float> values;
  uint64_t last_op;
};

struct Wait {
  const char* what = "running";
  const void* object = nullptr;
  uint32_t detail = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  int index = 0;
  bool done = false;
  bool (*ready)(void*) = nullptr;  // null: can run
  void* predicate = nullptr;
  Wait wait;
  int registers = 0;

  // wgmma
  std::vector<InFlight> in_flight;
  uint64_t issued = 0;
  std::deque<uint64_t> groups;  // `issued` at each commit
  uint64_t groups_committed = 0;
  bool fenced = false;

  // TMA stores
  int stores_issued = 0;
  std::deque<int> store_groups;
  std::deque<std::shared_ptr<bool>> stores;  // landed?

  // shared memory written by ordinary stores, not yet fenced for the async proxy
  std::vector<SharedRange> unfenced;

  // global memory: stores wait in `pending` until a release covers them; `covered` of them were ordered
  // before a warp or CTA barrier. A load of data newer than `seen` returns NaN.
  std::vector<PendingStore> pending;
  size_t covered_by_warp = 0, covered_by_cta = 0;
  uint64_t seen = 0;
};

struct MBarrier {
  int expected, pending;
  int64_t bytes;
  uint32_t phase;
  bool published;  // fence after init
  int owner;
};

struct WgmmaOp {
  Format format;
  int n;
  uint64_t desc_a, desc_b;
  bool from_registers, b_mn_major, accumulate;
  int threads = 0;
  float* registers[kWarpgroup];
  const uint32_t* a_source[kWarpgroup];
  uint32_t a[kWarpgroup][4];
};
struct Warpgroup {
  std::map<uint64_t, std::unique_ptr<WgmmaOp>> ops;
  uint64_t executed = 0;
};
// One exchange at a time; two generations, because a fast lane may enter the next one.
struct WarpExchange {
  int arrived = 0;
  uint64_t generation = 0;
  uint32_t value[2][kWarp];
  uint64_t seen[2] = {0, 0};
};
struct NamedBarrier {
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
  uint64_t seen[2] = {0, 0};
};

enum class Async { tma, wgmma };

struct Cta {
  int index = 0, live = 0;
  Policy policy = Policy::random;
  std::mt19937 random;
  uint64_t now = 0;
  std::function<void()> body;
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  size_t stack_bytes = 0;
  void* scheduler_stack = nullptr;
  std::exception_ptr error;

  std::vector<char> storage, storage_async;
  char* shared = nullptr;        // what ordinary loads and stores see
  char* shared_async = nullptr;  // what TMA and wgmma see
  size_t shared_bytes = 0;
  std::unordered_map<uint32_t, MBarrier> barriers;  // by offset
  std::map<int, NamedBarrier> named;
  std::vector<WarpExchange> warps;
  std::vector<Warpgroup> warpgroups;
  int free_registers = 0;
  int tma_in_flight = 0;
  std::multimap<uint64_t, std::function<void()>> events;
  LaunchStats stats;

  ~Cta();
};

struct GlobalWord {
  uint64_t version = 0;
  int writer = -1;
};
struct GlobalMemory {
  struct Buffer {
    GlobalBuffer info;
    std::vector<GlobalWord> words;
  };
  uint64_t clock = 0;
  std::vector<Buffer> buffers;
  std::unordered_map<const void*, uint64_t> flag_version;

  Buffer* find(const void* p, size_t bytes);
};

extern thread_local Cta* current_cta;
extern thread_local Fiber* current_fiber;
extern thread_local GlobalMemory* global_memory;
extern thread_local const LaunchOptions* current_options;

[[noreturn]] void fail(const std::string& what);
std::string shared_name(uint32_t offset);
void yield_fiber();

// Preempts at random, then lets the fiber sleep until the condition holds.
template <class Condition>
__attribute__((noinline)) void wait_until(const Wait& wait, Condition condition) {
  Fiber* self = current_fiber;
  if (current_cta->random() % 8 == 0) {
    self->ready = nullptr;
    yield_fiber();
  }
  while (!condition()) {
    self->wait = wait;
    self->predicate = &condition;
    self->ready = [](void* c) { return (*static_cast<Condition*>(c))(); };
    yield_fiber();
  }
  self->ready = nullptr;
  self->wait = {};
}

// Runs `event` after a delay that the policy chooses.
void schedule(Async kind, std::function<void()> event);

void publish_stores(Fiber& writer, size_t count);
void finish_cta_memory(Cta& cta);
int thread_id(const Fiber& fiber);  // unique in the grid

}  // namespace chip
