#include "csrc/common/dispatch.h"

#include <atomic>
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

// Who serves, by what rf_kernels.backend() and RF_BACKEND say (BACKENDS in rf_kernels/_backend.py); and what
// Python has told about Triton.
enum class Request : int { kAuto, kNative, kTriton };
std::atomic<Request> request{Request::kAuto};
std::atomic<bool> triton_loaded{false}, triton_interpreted{false}, rocm{false};

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

void set_backend(int64_t asked) {
  request = static_cast<Request>(asked);
}
int64_t backend() {
  return static_cast<int64_t>(request.load());
}
void set_triton(bool interpreted, bool torch_is_rocm) {
  triton_interpreted = interpreted;
  rocm = torch_is_rocm;
  triton_loaded = true;
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

bool on_rocm() {
  return rocm;
}

const char* own_kernels_problem([[maybe_unused]] int32_t device_index) {
  if (rocm) return "ROCm: this library has no kernels of its own there";
#if defined(RF_WITH_CUDA)
  if (const char* problem = cuda_problem()) return problem;
  return cuda_has_code(device_index) ? nullptr : "this build has no code for this GPU (RF_CUDA_ARCHS)";
#else
  return kNoCudaPart;
#endif
}

bool triton_serves(const char* op, const Tensor& like, const char* problem) {
  const bool asked = request == Request::kTriton;
  const char* refused = !triton_loaded                             ? "it is not installed"
                        : like.scalar_type() == ScalarType::Double ? "float64 is not served"
                        : like.is_cpu() && !triton_interpreted
                            ? "CPU tensors, and not its interpreter (TRITON_INTERPRET=1)"
                        : !like.is_cpu() && triton_interpreted ? "its interpreter takes CPU tensors alone"
                                                               : nullptr;
  if (asked && refused != nullptr)
    throw std::runtime_error(concat("rf_kernels.", op, ": Triton is asked for and cannot serve: ", refused));
  if (asked) {
    record_dispatch(op, "triton", "asked for");
    return true;
  }
  if (problem == nullptr || refused != nullptr || request == Request::kNative) return false;
  record_fallback(op, "triton", problem);
  return true;
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
  m.impl("backend", TORCH_BOX(&rf::backend));
  m.impl("set_backend", TORCH_BOX(&rf::set_backend));
  m.impl("set_triton", TORCH_BOX(&rf::set_triton));
}
