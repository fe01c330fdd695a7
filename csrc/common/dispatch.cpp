#include "csrc/common/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <tuple>

namespace rf {
namespace {

struct Dispatch {
  const char* op = "";
  const char* backend = "";
  const char* reason = "";
  bool fallback = false;
};
thread_local Dispatch last;

bool strict() {
  const char* value =
      std::getenv("RF_STRICT");  // read per fallback, never on the fast path: tests and users may set it late
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// This thread's last call: the addresses of op, backend and reason, which are literals of this library
// (PyTorch's stable ABI loses the memory of a string that is returned), and whether it was a fallback.
std::tuple<int64_t, int64_t, int64_t, bool> last_dispatch() {
  const auto address = [](const char* text) {
    return static_cast<int64_t>(reinterpret_cast<intptr_t>(text));
  };
  return {address(last.op), address(last.backend), address(last.reason), last.fallback};
}

std::string cuda_problem_text() {
  const char* problem = cuda_problem();
  return problem == nullptr ? "" : problem;
}

}  // namespace

void record_dispatch(const char* op, const char* backend, const char* reason) {
  last = {op, backend, reason, false};
}

void record_fallback(const char* op, const char* backend, const char* reason) {
  if (strict())
    throw std::runtime_error(
        concat("rf_kernels.", op, ": RF_STRICT=1 forbids the fallback to ", backend, ": ", reason));
  last = {op, backend, reason, true};
}

#if !defined(RF_WITH_CUDA)
const char* cuda_error_text(int) {
  return kNoCudaPart;
}
const char* cuda_problem() {
  return cuda_error_text(0);
}
#endif

}  // namespace rf

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CompositeExplicitAutograd, m) {
  m.impl("last_dispatch", TORCH_BOX(&rf::last_dispatch));
  m.impl("cuda_problem", TORCH_BOX(&rf::cuda_problem_text));
}
