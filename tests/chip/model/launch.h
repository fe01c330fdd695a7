// Running a grid on the functional model of the chip.
//
// A grid is CTAs that run concurrently (at most `resident` at a time), a CTA is fibers on one OS thread;
// every decision follows from the seed. It is a model of what is allowed to happen, not of time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace chip {

// What the chip would have answered with wrong results, a trap or a hang.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// When asynchronous work lands. "late" = only when no thread of the CTA can run, so that no missing wait is
// hidden by luck; what is not late then lands at once.
enum class Policy { random = 0, tma_late = 1, wgmma_late = 2 };

// Global memory that the kernel may touch. Results of one launch start unwritten.
struct GlobalBuffer {
  std::string name;
  void* base;
  size_t bytes;
};

// How reports call an object in shared memory.
struct SharedName {
  std::string name;
  size_t offset;
  size_t bytes, count;
};

struct LaunchOptions {
  int grid = 1, threads = 128;
  int registers_per_thread = 128;  // at launch; setmaxnreg moves them between warpgroups
  size_t shared_bytes = 0;
  Policy policy = Policy::random;
  uint32_t seed = 0;
  int resident = 1 << 20;
  std::vector<GlobalBuffer> global;
  std::vector<SharedName> shared_names;
};

struct LaunchStats {
  uint64_t switches = 0, wgmma = 0, tma = 0, shuffles = 0;
  uint64_t global_written = 0;  // bytes that plain and TMA stores wrote
};

LaunchStats launch(const LaunchOptions& options, const std::function<void()>& body);

}  // namespace chip
