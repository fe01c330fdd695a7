// torch_parallel_for on std::thread, preloaded in place of PyTorch's under ThreadSanitizer: OpenMP's
// barriers are invisible to it, the start and end of a thread are not. The range is cut into as many
// pieces as it has iterations, up to kThreads, whatever the grain.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
std::atomic<int64_t> started{0};
}

extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kThreads = 4;
  const int64_t pieces = std::min(kThreads, end - begin);
  std::vector<std::thread> threads;
  const auto bound = [&](int64_t i) { return begin + (end - begin) * i / pieces; };
  for (int64_t i = 1; i < pieces; ++i) threads.emplace_back(body, bound(i), bound(i + 1), context);
  started += static_cast<int64_t>(threads.size());
  if (pieces > 0) body(begin, bound(1), context);  // the first on the calling thread, as PyTorch does
  for (auto& thread : threads) thread.join();
  return 0;
}

// How many threads the loops above have started: none would mean that PyTorch's were used.
extern "C" __attribute__((visibility("default"))) int64_t threads_started() {
  return started;
}

// Planted: the pieces of a loop add to one number.
extern "C" __attribute__((visibility("default"))) void racing_loop() {
  int64_t sum = 0;
  const auto body = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) *static_cast<int64_t*>(context) += i;
  };
  torch_parallel_for(0, 1000, 1, body, &sum);
}
