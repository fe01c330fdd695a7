// Shared memory with its two proxies, the bulk tensor copy engine, and global memory with release and
// acquire.
#include <algorithm>
#include <cstring>

#include "tests/chip/model/layouts.h"
#include "tests/chip/model/state.h"

namespace chip {

void complete_bytes(uint32_t barrier_offset, int64_t bytes);  // machine.cpp

// ---- shared memory
// Two copies: what ordinary instructions see, and what TMA and wgmma see. An ordinary store reaches the
// second copy when the storing thread fences; what TMA writes reaches both (its mbarrier hands it over).
char* shared_memory() {
  return current_cta->shared;
}
uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - current_cta->shared);
}

void shared_store(void* p, const void* value, int bytes) {
  const uint32_t offset = shared_address(p);
  if (offset + bytes > current_cta->shared_bytes) fail("store outside shared memory");
  if (offset % bytes != 0) fail("misaligned store of " + std::to_string(bytes) + " bytes to shared memory");
  std::memcpy(p, value, bytes);
  current_fiber->unfenced.push_back({offset, static_cast<uint32_t>(bytes)});
}
void fence_proxy_async_shared() {
  for (const SharedRange& r : current_fiber->unfenced)
    std::memcpy(current_cta->shared_async + r.offset, current_cta->shared + r.offset, r.bytes);
  current_fiber->unfenced.clear();
}

// ---- the copy engine
namespace {
struct Box {
  const TensorMap* map;
  int64_t start[5];
  uint32_t shared;
  uint32_t row_bytes, rows;

  uint32_t bytes() const { return row_bytes * rows; }
};

Box checked_box(const TensorMap* map, const void* smem, const int (&coord)[5]) {
  Box box{map,
          {coord[0], coord[1], coord[2], coord[3], coord[4]},
          shared_address(smem),
          map->box[0] * map->element_bytes,
          1};
  for (int i = 1; i < 5; ++i) box.rows *= map->box[i];
  for (int i = 0; i < 5; ++i)
    if (map->box[i] < 1 || map->box[i] > 256) fail("TMA box dimension " + std::to_string(map->box[i]));
  for (int i = 1; i < 5; ++i)
    if (map->stride_bytes[i] % 16 != 0) fail("TMA stride that is no multiple of 16 bytes");
  if (reinterpret_cast<uintptr_t>(map->base) % 16 != 0) fail("TMA tensor that is not 16-byte aligned");
  if (box.row_bytes % 16 != 0) fail("TMA box row that is no multiple of 16 bytes");
  if (map->swizzle_bytes != 0 && box.row_bytes > map->swizzle_bytes)
    fail("TMA box row wider than the swizzle span");
  const uint32_t alignment = map->swizzle_bytes != 0 ? map->swizzle_bytes * 8 : 128;
  if (box.shared % alignment != 0)
    fail("TMA tile at shared+" + std::to_string(box.shared) + " misaligned for its swizzle");
  if (box.shared + box.bytes() > current_cta->shared_bytes) fail("TMA tile outside shared memory");
  return box;
}

// Calls f(shared offset, global address or null when outside the tensor) for each 16-byte chunk of box rows
// [from, to).
template <class F>
void for_each_chunk(const Box& box, uint32_t from, uint32_t to, F f) {
  const TensorMap& m = *box.map;
  for (uint32_t row = from; row < to; ++row) {
    uint32_t rest = row;
    bool inside = true;
    int64_t offset = 0;
    for (int d = 1; d < 5; ++d) {
      const int64_t x = box.start[d] + rest % m.box[d];
      rest /= m.box[d];
      inside = inside && x >= 0 && static_cast<uint64_t>(x) < m.size[d];
      offset += x * static_cast<int64_t>(m.stride_bytes[d]);
    }
    for (uint32_t b = 0; b < box.row_bytes; b += 16) {
      const int64_t element = box.start[0] + b / m.element_bytes;
      const int64_t last = element + 16 / m.element_bytes - 1;
      const bool in = inside && element >= 0 && static_cast<uint64_t>(last) < m.size[0];
      f(swizzle(box.shared + row * box.row_bytes + b, m.swizzle_bytes),
        in ? m.base + offset + element * m.element_bytes : nullptr);
    }
  }
}

GlobalMemory::Buffer& checked_global(const void* p, size_t bytes, const char* what) {
  GlobalMemory::Buffer* buffer = global_memory->find(p, bytes);
  if (buffer == nullptr) fail(std::string(what) + " outside every global buffer");
  return *buffer;
}
}  // namespace

void tma_load(const TensorMap* map, void* barrier, void* smem, const int (&coord)[5]) {
  const Box box = checked_box(map, smem, coord);
  const uint32_t barrier_offset = shared_address(barrier);
  const auto b = current_cta->barriers.find(barrier_offset);
  if (b == current_cta->barriers.end() || !b->second.published)
    fail("TMA on an mbarrier whose init was not published: " + shared_name(barrier_offset));
  for (const auto& [offset, other] : current_cta->barriers)
    if (offset + 8 > box.shared && offset < box.shared + box.bytes())
      fail("TMA tile over mbarrier " + shared_name(offset));
  ++current_cta->stats.tma;
  // Until the copy lands, the destination holds nothing that may be read.
  std::memset(current_cta->shared + box.shared, 0xFF, box.bytes());
  std::memset(current_cta->shared_async + box.shared, 0xFF, box.bytes());
  // It lands in two parts: a barrier that expects too few bytes completes before the second.
  const uint32_t cut = box.rows > 1 ? 1 + current_cta->random() % (box.rows - 1) : 1;
  const uint32_t parts[3] = {0, cut, box.rows};
  for (int i = 0; i < 2; ++i) {
    if (parts[i] == parts[i + 1]) continue;
    ++current_cta->tma_in_flight;
    schedule(Async::tma, [box, barrier_offset, from = parts[i], to = parts[i + 1]] {
      --current_cta->tma_in_flight;
      for_each_chunk(box, from, to, [](uint32_t shared, const char* global) {
        char chunk[16] = {};
        if (global != nullptr) {
          checked_global(global, 16, "TMA load");
          std::memcpy(chunk, global, 16);
        }
        std::memcpy(current_cta->shared + shared, chunk, 16);
        std::memcpy(current_cta->shared_async + shared, chunk, 16);
      });
      complete_bytes(barrier_offset, static_cast<int64_t>(to - from) * box.row_bytes);
    });
  }
}

void tma_store(const TensorMap* map, const void* smem, const int (&coord)[5]) {
  const Box box = checked_box(map, smem, coord);
  ++current_cta->stats.tma;
  ++current_cta->tma_in_flight;
  auto landed = std::make_shared<bool>(false);
  current_fiber->stores.push_back(landed);
  schedule(Async::tma, [box, landed] {
    --current_cta->tma_in_flight;
    for_each_chunk(box, 0, box.rows, [](uint32_t shared, const char* global) {
      if (global == nullptr) return;
      checked_global(global, 16, "TMA store");
      std::memcpy(const_cast<char*>(global), current_cta->shared_async + shared, 16);
      current_cta->stats.global_written += 16;
    });
    *landed = true;
  });
}
void tma_store_commit() {
  current_fiber->store_groups.push_back(static_cast<int>(current_fiber->stores.size()));
}
void tma_store_wait(int pending) {
  Fiber* self = current_fiber;
  const int groups = static_cast<int>(self->store_groups.size());
  const int upto = groups > pending ? self->store_groups[groups - 1 - pending] : 0;
  wait_until({"TMA store wait"}, [=] {
    return std::all_of(self->stores.begin(), self->stores.begin() + upto, [](const auto& s) { return *s; });
  });
}

// ---- global memory
GlobalMemory::Buffer* GlobalMemory::find(const void* p, size_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (Buffer& b : buffers) {
    const char* base = static_cast<const char*>(b.info.base);
    if (at >= base && at + bytes <= base + b.info.bytes) return &b;
  }
  return nullptr;
}

static GlobalWord& word_of(GlobalMemory::Buffer& b, const void* p) {
  return b.words[(static_cast<const char*>(p) - static_cast<const char*>(b.info.base)) / 4];
}
static void check_alignment(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail(std::string("misaligned ") + std::to_string(bytes) + "-byte global " + what);
}

void global_store(void* p, const void* value, int bytes) {
  check_alignment(p, bytes, "store");
  checked_global(p, bytes, "store");
  PendingStore s{reinterpret_cast<uintptr_t>(p), bytes, {}};
  std::memcpy(s.data, value, bytes);
  current_fiber->pending.push_back(s);
}

void global_load(const void* p, void* value, int bytes) {
  check_alignment(p, bytes, "load");
  GlobalMemory::Buffer& buffer = checked_global(p, bytes, "load");
  std::memcpy(value, p, bytes);
  const int me = thread_id(*current_fiber);
  for (int i = 0; i < bytes; i += 4) {  // another thread's data, newer than what this thread has acquired
    const GlobalWord& w = word_of(buffer, static_cast<const char*>(p) + i);
    if (w.version > current_fiber->seen && w.writer != me)
      std::memset(static_cast<char*>(value) + i, 0xFF, 4);
  }
  for (const PendingStore& s : current_fiber->pending)  // a thread sees its own stores
    for (int i = 0; i < s.bytes; i += 4) {
      const intptr_t at = static_cast<intptr_t>(s.address) + i - reinterpret_cast<intptr_t>(p);
      if (at >= 0 && at < bytes) std::memcpy(static_cast<char*>(value) + at, s.data + i, 4);
    }
}

void publish_stores(Fiber& writer, size_t count) {
  const int id = thread_id(writer);
  for (size_t i = 0; i < count; ++i) {
    const PendingStore& s = writer.pending[i];
    GlobalMemory::Buffer& buffer = *global_memory->find(reinterpret_cast<void*>(s.address), s.bytes);
    for (int b = 0; b < s.bytes; b += 4) {
      GlobalWord& w = word_of(buffer, reinterpret_cast<void*>(s.address + b));
      if (w.version > writer.seen && w.writer != id)
        fail("two threads write " + buffer.info.name + "+" +
             std::to_string(s.address + b - reinterpret_cast<uintptr_t>(buffer.info.base)) +
             " without an order between them");
      w = {global_memory->clock, id};
    }
    std::memcpy(reinterpret_cast<void*>(s.address), s.data, s.bytes);
    current_cta->stats.global_written += s.bytes;
  }
  writer.pending.erase(writer.pending.begin(), writer.pending.begin() + static_cast<std::ptrdiff_t>(count));
  writer.covered_by_warp -= std::min(writer.covered_by_warp, count);
  writer.covered_by_cta -= std::min(writer.covered_by_cta, count);
}

void finish_cta_memory(Cta& cta) {
  ++global_memory->clock;
  for (Fiber& f : cta.fibers) publish_stores(f, f.pending.size());
}

// A release is cumulative: it covers this thread's stores, and those of others that a barrier put before it.
void flag_store(uint32_t* flag, uint32_t value, bool release) {
  checked_global(flag, 4, "flag store");
  if (release) {
    ++global_memory->clock;
    for (Fiber& f : current_cta->fibers) {
      size_t count = f.covered_by_cta;
      if (f.index / kWarp == current_fiber->index / kWarp) count = std::max(count, f.covered_by_warp);
      publish_stores(f, &f == current_fiber ? f.pending.size() : count);
    }
    global_memory->flag_version[flag] = global_memory->clock;
  }
  *static_cast<volatile uint32_t*>(flag) = value;
}
void flag_wait(uint32_t* flag, bool acquire) {
  checked_global(flag, 4, "flag load");
  wait_until({"global flag"}, [=] { return *static_cast<volatile uint32_t*>(flag) != 0; });
  if (acquire) current_fiber->seen = std::max(current_fiber->seen, global_memory->flag_version[flag]);
}
uint32_t atomic_add(uint32_t* counter, uint32_t x) {
  checked_global(counter, 4, "atomic");
  const uint32_t old = *counter;
  *counter = old + x;
  return old;
}

}  // namespace chip
