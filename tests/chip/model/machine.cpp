// The machine: fibers, the scheduler with its latency policies, warps, named barriers, mbarriers, registers.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <sstream>

#include "tests/chip/model/state.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace chip {

thread_local Cta* current_cta = nullptr;
thread_local Fiber* current_fiber = nullptr;
thread_local GlobalMemory* global_memory = nullptr;
thread_local const LaunchOptions* current_options = nullptr;

namespace {
constexpr size_t kStackBytes = 64 << 10;
constexpr int kMaxDelay = 60;           // scheduler rounds, policy random
constexpr uint64_t kLate = 1ull << 40;  // after everything that can run
}  // namespace

// ---- switching stacks: 10x faster than swapcontext, which makes a system call
#if defined(__x86_64__)
extern "C" void rf_chip_switch(void** save, void* load);
asm(".text\n.weak rf_chip_switch\n.type rf_chip_switch,@function\nrf_chip_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    ".size rf_chip_switch,.-rf_chip_switch\n");
static void* new_stack(char* base, void (*entry)()) {
  void** top = reinterpret_cast<void**>(base + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // the six registers that the first switch pops
  return top - 8;
}
#else
static void rf_chip_switch(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}
static void* new_stack(char* base, void (*entry)()) {
  ucontext_t* context = new (base) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = base + sizeof(ucontext_t);
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

void yield_fiber() {
  ++current_cta->stats.switches;
  rf_chip_switch(&current_fiber->stack_pointer, current_cta->scheduler_stack);
}

static void fiber_main() {
  try {
    current_cta->body();
  } catch (...) {
    if (!current_cta->error) current_cta->error = std::current_exception();
  }
  current_fiber->done = true;
  for (;;) yield_fiber();
}

// ---- reports
std::string shared_name(uint32_t offset) {
  for (const SharedName& n : current_options->shared_names)
    if (offset >= n.offset && offset < n.offset + n.bytes * n.count) {
      const size_t i = (offset - n.offset) / n.bytes;
      return n.count > 1 ? n.name + "[" + std::to_string(i) + "]" : n.name;
    }
  return "shared+" + std::to_string(offset);
}

void fail(const std::string& what) {
  std::string where;
  if (current_cta != nullptr) where = "CTA " + std::to_string(current_cta->index);
  if (current_fiber != nullptr) where += " thread " + std::to_string(current_fiber->index);
  throw Fault(where + ": " + what);
}

int thread_id(const Fiber& fiber) {
  return current_cta->index * static_cast<int>(current_cta->fibers.size()) + fiber.index;
}

static std::string describe(Cta& cta, const Fiber& fiber) {
  std::ostringstream out;
  out << fiber.wait.what;
  const std::string what = fiber.wait.what;
  if (what == "mbarrier wait") {
    const MBarrier& b = cta.barriers.at(fiber.wait.detail);
    out << " on " << shared_name(fiber.wait.detail) << " (" << b.pending << " arrivals and " << b.bytes
        << " bytes missing)";
  } else if (what == "named barrier") {
    const NamedBarrier& b = cta.named[static_cast<int>(fiber.wait.detail)];
    out << ' ' << fiber.wait.detail << " (" << b.arrived << " of " << b.threads << " arrived)";
  } else if (what == "setmaxnreg") {
    out << ".inc (" << cta.free_registers << " registers free)";
  }
  return out.str();
}

static std::string deadlock_report(const std::vector<std::unique_ptr<Cta>>& live) {
  std::map<std::string, std::pair<int, std::string>> waits;
  for (const auto& cta : live)
    for (const Fiber& fiber : cta->fibers)
      if (!fiber.done) {
        auto& [count, first] = waits[describe(*cta, fiber)];
        if (count++ == 0)
          first = "CTA " + std::to_string(cta->index) + " thread " + std::to_string(fiber.index);
      }
  std::ostringstream out;
  out << "deadlock:";
  for (const auto& [what, who] : waits)
    out << ' ' << who.first << " threads (first: " << who.second << ") in " << what << ';';
  return out.str();
}

// ---- scheduler
void schedule(Async kind, std::function<void()> event) {
  Cta& cta = *current_cta;
  uint64_t delay = 1;
  if (cta.policy == Policy::random) delay = 1 + cta.random() % kMaxDelay;
  const bool late = cta.policy == (kind == Async::tma ? Policy::tma_late : Policy::wgmma_late);
  if (late) delay = kLate + cta.random() % kMaxDelay;
  cta.events.emplace(cta.now + delay, std::move(event));
}

Cta::~Cta() {
  if (stacks != nullptr) munmap(stacks, stack_bytes);
}

static std::unique_ptr<Cta> start_cta(int index, const LaunchOptions& o, const std::function<void()>& body) {
  auto cta = std::make_unique<Cta>();
  cta->index = index;
  cta->policy = o.policy;
  cta->random.seed(o.seed * 7919 + index);
  cta->body = body;
  cta->live = o.threads;
  cta->shared_bytes = o.shared_bytes;
  for (auto* s : {&cta->storage, &cta->storage_async})
    s->assign(o.shared_bytes + 2048, static_cast<char>(0xFF));  // NaN
  const auto align = [](std::vector<char>& s) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(s.data()) + 1023) & ~uintptr_t{1023});
  };
  cta->shared = align(cta->storage);
  cta->shared_async = align(cta->storage_async);
  cta->warps.resize(o.threads / kWarp);
  cta->warpgroups.resize((o.threads + kWarpgroup - 1) / kWarpgroup);
  cta->stack_bytes = kStackBytes * o.threads;
  void* stacks = mmap(nullptr, cta->stack_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  cta->stacks = static_cast<char*>(stacks);
  cta->fibers.resize(o.threads);
  for (int t = 0; t < o.threads; ++t) {
    Fiber& f = cta->fibers[t];
    f.index = t;
    f.registers = o.registers_per_thread;
    f.stack_pointer = new_stack(cta->stacks + kStackBytes * t, fiber_main);
  }
  return cta;
}

// One round of a CTA: what is due lands, then every thread that can run runs. False when nothing moved.
static bool run_round(Cta& cta) {
  current_cta = &cta;
  ++cta.now;
  bool moved = false;
  try {
    while (!cta.events.empty() && cta.events.begin()->first <= cta.now) {
      const auto event = std::move(cta.events.begin()->second);
      cta.events.erase(cta.events.begin());
      event();
      moved = true;
    }
  } catch (...) {
    cta.error = std::current_exception();
    return true;
  }
  const int threads = static_cast<int>(cta.fibers.size()), first = static_cast<int>(cta.random() % threads);
  for (int i = 0; i < threads && !cta.error; ++i) {
    Fiber& f = cta.fibers[(i + first) % threads];
    if (f.done || (f.ready != nullptr && !f.ready(f.predicate))) continue;
    moved = true;
    current_fiber = &f;
    rf_chip_switch(&cta.scheduler_stack, f.stack_pointer);
    current_fiber = nullptr;
    if (f.done) --cta.live;
  }
  if (!moved && !cta.events.empty()) {
    cta.now = cta.events.begin()->first;
    moved = true;
  }
  return moved;
}

// What must hold when the last thread of a CTA has returned.
static void retire(Cta& cta) {
  current_cta = &cta;
  for (const Warpgroup& w : cta.warpgroups)
    if (!w.ops.empty()) fail("exit with wgmma in flight");
  if (cta.tma_in_flight != 0) fail("exit with TMA in flight");
  for (const auto& [offset, b] : cta.barriers)
    if (b.bytes != 0)
      fail("exit with " + std::to_string(b.bytes) + " transaction bytes missing on " + shared_name(offset));
  finish_cta_memory(cta);
}

LaunchStats launch(const LaunchOptions& options, const std::function<void()>& body) {
  if (options.threads % kWarp != 0 || options.threads > 1024 || options.grid < 1)
    throw Fault("launch: bad grid or block");
  GlobalMemory memory;
  for (const GlobalBuffer& b : options.global)
    memory.buffers.push_back({b, std::vector<GlobalWord>((b.bytes + 3) / 4)});
  global_memory = &memory;
  current_options = &options;
  std::mt19937 random(options.seed);
  std::vector<std::unique_ptr<Cta>> live;
  LaunchStats total;
  std::exception_ptr error;
  int next = 0;
  try {
    while (next < options.grid || !live.empty()) {
      while (next < options.grid && static_cast<int>(live.size()) < options.resident)
        live.push_back(start_cta(next++, options, body));
      bool moved = false;
      const size_t first = random() % live.size();
      for (size_t i = 0; i < live.size(); ++i) {
        Cta& cta = *live[(i + first) % live.size()];
        if (cta.live > 0) moved |= run_round(cta);
        if (cta.error) std::rethrow_exception(cta.error);
      }
      for (size_t i = 0; i < live.size();) {
        Cta& cta = *live[i];
        if (cta.live > 0) {
          ++i;
          continue;
        }
        retire(cta);
        total.switches += cta.stats.switches;
        total.wgmma += cta.stats.wgmma;
        total.tma += cta.stats.tma;
        total.shuffles += cta.stats.shuffles;
        total.global_written += cta.stats.global_written;
        live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
        moved = true;
      }
      if (!moved) {
        current_cta = nullptr;
        throw Fault(deadlock_report(live));
      }
    }
  } catch (...) {
    error = std::current_exception();
  }
  live.clear();
  current_cta = nullptr;
  current_fiber = nullptr;
  global_memory = nullptr;
  current_options = nullptr;
  if (error) std::rethrow_exception(error);
  return total;
}

// ---- threads, warps, registers
int thread_index() {
  return current_fiber->index;
}

int block_index() {
  return current_cta->index;
}

// A warp-wide exchange also carries what sync_warp orders: `ordering` says whether this one does (shfl does
// not).
static uint32_t exchange(uint32_t v, int source_lane, bool ordering) {
  Fiber* self = current_fiber;
  WarpExchange* w = &current_cta->warps[self->index / kWarp];
  const uint64_t generation = w->generation;
  const int slot = generation & 1;
  if (w->arrived == 0) w->seen[slot] = 0;
  w->value[slot][self->index % kWarp] = v;
  if (ordering) {
    w->seen[slot] = std::max(w->seen[slot], self->seen);
    self->covered_by_warp = self->pending.size();
  }
  if (++w->arrived == kWarp) {
    w->arrived = 0;
    ++w->generation;
  } else {
    wait_until({ordering ? "warp barrier" : "shuffle"}, [=] { return w->generation != generation; });
  }
  if (ordering) self->seen = std::max(self->seen, w->seen[slot]);
  return w->value[slot][source_lane];
}

uint32_t shuffle(uint32_t v, int source_lane) {
  ++current_cta->stats.shuffles;
  return exchange(v, source_lane, false);
}
void sync_warp() {
  exchange(0, 0, true);
}
bool any_in_warp(bool x) {  // a vote orders no memory
  const WarpExchange* w = &current_cta->warps[current_fiber->index / kWarp];
  const int slot = w->generation & 1;
  exchange(x, 0, false);
  return std::any_of(w->value[slot], w->value[slot] + kWarp, [](uint32_t v) { return v != 0; });
}

void set_registers(int per_thread, bool increase) {
  Cta* cta = current_cta;
  Fiber* self = current_fiber;
  if (per_thread % 8 != 0 || per_thread < 24 || per_thread > 256)
    fail("setmaxnreg: count not in 24, 32, ... 256");
  const int change = per_thread - self->registers;
  if (increase ? change < 0 : change > 0) fail("setmaxnreg in the wrong direction");
  if (increase) wait_until({"setmaxnreg"}, [=] { return cta->free_registers >= change; });
  cta->free_registers -= change;
  self->registers = per_thread;
}

// ---- barriers between warps
void named_barrier(int id, int threads, bool wait) {
  if (id < 0 || id >= 16) fail("named barrier id " + std::to_string(id));
  Fiber* self = current_fiber;
  NamedBarrier* b = &current_cta->named[id];
  if (b->arrived != 0 && b->threads != threads)
    fail("named barrier " + std::to_string(id) + " used with " + std::to_string(b->threads) + " and " +
         std::to_string(threads) + " threads");
  b->threads = threads;
  const uint64_t generation = b->generation;
  const int slot = generation & 1;
  if (b->arrived == 0) b->seen[slot] = 0;
  b->seen[slot] = std::max(b->seen[slot], self->seen);
  self->covered_by_cta = self->pending.size();
  if (++b->arrived == threads) {
    b->arrived = 0;
    ++b->generation;
  } else if (wait) {
    wait_until({"named barrier", b, static_cast<uint32_t>(id)}, [=] { return b->generation != generation; });
  }
  if (wait) self->seen = std::max(self->seen, b->seen[slot]);
}
void sync_cta() {
  named_barrier(0, static_cast<int>(current_cta->fibers.size()), true);
}

// ---- mbarriers
static MBarrier& barrier_at(const void* p) {
  const auto it = current_cta->barriers.find(shared_address(p));
  if (it == current_cta->barriers.end())
    fail("mbarrier " + shared_name(shared_address(p)) + " used before its init");
  if (!it->second.published && it->second.owner != current_fiber->index)
    fail("mbarrier " + shared_name(shared_address(p)) + " used before the fence that publishes its init");
  return it->second;
}

void mbarrier_init(void* barrier, int arrivals) {
  const uint32_t offset = shared_address(barrier);
  if (offset % 8 != 0 || offset + 8 > current_cta->shared_bytes)
    fail("mbarrier misaligned or outside shared memory");
  if (arrivals < 1) fail("mbarrier init with a count below 1");
  current_cta->barriers[offset] = {arrivals, arrivals, 0, 0, false, current_fiber->index};
}
void fence_mbarrier_init() {
  for (auto& [offset, b] : current_cta->barriers)
    if (b.owner == current_fiber->index) b.published = true;
}

static void complete_phase(MBarrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
  }
}
void mbarrier_arrive(void* barrier, uint32_t expected_bytes) {
  MBarrier& b = barrier_at(barrier);
  b.bytes += expected_bytes;
  if (b.bytes >= 1 << 20)
    fail("more than 2^20 - 1 transaction bytes on " + shared_name(shared_address(barrier)));
  if (--b.pending < 0) fail("one arrival too many on mbarrier " + shared_name(shared_address(barrier)));
  complete_phase(b);
}
void mbarrier_wait(void* barrier, uint32_t parity) {
  MBarrier* b = &barrier_at(barrier);
  if (parity > 1) fail("mbarrier parity " + std::to_string(parity));
  wait_until({"mbarrier wait", b, shared_address(barrier)}, [=] { return b->phase != parity; });
}

// Called by the copy engine (memory.cpp) when bytes land.
void complete_bytes(uint32_t offset, int64_t bytes) {
  MBarrier& b = current_cta->barriers.at(offset);
  b.bytes -= bytes;
  complete_phase(b);
}

}  // namespace chip
