// wgmma: operands from descriptors, results into registers that stay poisoned until the wait.
#include <cmath>
#include <cstring>
#include <limits>

#include "csrc/math/dtype.h"
#include "tests/chip/model/layouts.h"
#include "tests/chip/model/state.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RF_CHIP_VECTOR \
  __attribute__((target_clones("avx2", "default")))  // no FMA: the same bits on every machine
#else
#define RF_CHIP_VECTOR
#endif

namespace chip {

namespace {
constexpr int kRows = 64, kDepth = 16, kMaxN = 256;

float to_float(Format format, uint16_t bits) {
  return format == Format::bf16 ? rf::to_acc(rf::bf16{bits}) : rf::to_acc(rf::f16{bits});
}

// 8 neighbours along the contiguous axis share a 16-byte chunk, which the swizzle keeps together.
float element(Format format, uint64_t desc, int mn, int k, bool mn_major) {
  const uint32_t address = operand_address(desc, mn, k, mn_major);
  if (address + 2 > current_cta->shared_bytes) throw Fault("wgmma operand outside shared memory");
  uint16_t bits;
  std::memcpy(&bits, current_cta->shared_async + address, 2);
  return to_float(format, bits);
}
void load_a(const WgmmaOp& op, float (&a)[kRows][kDepth]) {
  if (!op.from_registers) {
    for (int m = 0; m < kRows; ++m)
      for (int k = 0; k < kDepth; ++k) a[m][k] = element(op.format, op.desc_a, m, k, false);
    return;
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    if (std::memcmp(op.a_source[t], op.a[t], 16) != 0)
      throw Fault("A registers of a wgmma changed while it was in flight");
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 2; ++h) {
        const FragmentCoord x = a_operand_coord(t, j, h);
        a[x.row][x.col] = to_float(op.format, static_cast<uint16_t>(op.a[t][j] >> (16 * h)));
      }
  }
}
void load_b(const WgmmaOp& op, float (&b)[kDepth][kMaxN]) {
  for (int n = 0; n < op.n; ++n)
    for (int k = 0; k < kDepth; ++k) b[k][n] = element(op.format, op.desc_b, n, k, op.b_mn_major);
}

RF_CHIP_VECTOR void multiply(const float (&a)[kRows][kDepth], const float (&b)[kDepth][kMaxN], int n,
                             float (&d)[kRows][kMaxN]) {
  for (int m = 0; m < kRows; ++m) {
    for (int j = 0; j < n; ++j) d[m][j] = 0.f;
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < n; ++j) d[m][j] += a[m][k] * b[k][j];
  }
}

void execute(int warpgroup, const WgmmaOp& op) {
  static thread_local float a[kRows][kDepth], b[kDepth][kMaxN], d[kRows][kMaxN];
  load_a(op, a);
  load_b(op, b);
  multiply(a, b, op.n, d);
  for (int t = 0; t < kWarpgroup; ++t) {
    Fiber& f = current_cta->fibers[warpgroup * kWarpgroup + t];
    for (InFlight& acc : f.in_flight) {
      if (acc.registers != op.registers[t]) continue;
      for (int i = 0; i < op.n / 2; ++i) {
        const FragmentCoord x = accumulator_coord(t, i);
        acc.values[i] = op.accumulate ? acc.values[i] + d[x.row][x.col] : d[x.row][x.col];
      }
    }
  }
  ++current_cta->stats.wgmma;
}
}  // namespace

void wgmma_fence() {
  current_fiber->fenced = true;
}
void wgmma_commit() {
  current_fiber->groups.push_back(current_fiber->issued);
  if (current_fiber->groups.size() > 16) current_fiber->groups.pop_front();
}

void wgmma(Format format, int n, float* d, const uint32_t* regs_a, uint64_t desc_a, uint64_t desc_b,
           bool b_mn_major, bool accumulate) {
  Fiber& self = *current_fiber;
  const int warpgroup = self.index / kWarpgroup, t = self.index % kWarpgroup;
  if (n % 8 != 0 || n < 8 || n > kMaxN) fail("wgmma with n = " + std::to_string(n));
  if (!self.fenced) fail("wgmma on registers that ordinary instructions touched, without wgmma.fence");
  auto& slot = current_cta->warpgroups[warpgroup].ops[self.issued];
  if (!slot) {
    slot = std::make_unique<WgmmaOp>();
    slot->format = format;
    slot->n = n;
    slot->desc_a = desc_a;
    slot->desc_b = desc_b;
    slot->from_registers = regs_a != nullptr;
    slot->b_mn_major = b_mn_major;
    slot->accumulate = accumulate;
  }
  WgmmaOp& op = *slot;
  if (op.format != format || op.n != n || op.desc_a != desc_a || op.desc_b != desc_b ||
      op.from_registers != (regs_a != nullptr) || op.accumulate != accumulate)
    fail("wgmma operands differ between the threads of a warpgroup");
  op.registers[t] = d;
  op.a_source[t] = regs_a;
  if (regs_a != nullptr) std::memcpy(op.a[t], regs_a, 16);

  InFlight* acc = nullptr;
  for (InFlight& x : self.in_flight)
    if (x.registers == d) acc = &x;
  if (acc == nullptr) {
    self.in_flight.push_back({d, std::vector<float>(d, d + n / 2), 0});
    acc = &self.in_flight.back();
    for (int i = 0; i < n / 2; ++i) d[i] = std::numeric_limits<float>::quiet_NaN();
  }
  const uint64_t id = self.issued++;
  acc->last_op = id;
  if (++op.threads < kWarpgroup) return;
  schedule(Async::wgmma, [warpgroup, id] {  // in order within a warpgroup
    Warpgroup& w = current_cta->warpgroups[warpgroup];
    while (w.executed <= id) {
      const auto it = w.ops.find(w.executed);
      execute(warpgroup, *it->second);
      w.ops.erase(it);
      ++w.executed;
    }
  });
}

void wgmma_wait(int pending) {
  Fiber* self = current_fiber;
  const int groups = static_cast<int>(self->groups.size());
  const uint64_t upto = groups > pending ? self->groups[groups - 1 - pending] : 0;
  Warpgroup* w = &current_cta->warpgroups[self->index / kWarpgroup];
  wait_until({"wgmma wait"}, [=] { return w->executed >= upto; });
  for (size_t i = 0; i < self->in_flight.size();) {
    InFlight& acc = self->in_flight[i];
    if (acc.last_op >= upto) {
      ++i;
      continue;
    }
    for (size_t j = 0; j < acc.values.size(); ++j)
      if (!std::isnan(acc.registers[j])) fail("accumulator written while its wgmma was in flight");
    std::memcpy(acc.registers, acc.values.data(), acc.values.size() * sizeof(float));
    self->in_flight.erase(self->in_flight.begin() + static_cast<std::ptrdiff_t>(i));
  }
  self->fenced = false;
}

}  // namespace chip
