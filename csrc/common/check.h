// One error vocabulary: every failed check throws, with the op, the argument, what was expected and what was
// found.
//
// The text is the contract: rf_kernels/_backend.py turns a message of this form into
// rf_kernels.ArgumentError. Checks come before the first write of an op, so a refused call has changed
// nothing.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "csrc/common/cuda_status.h"
#include "csrc/common/torch_stable.h"

namespace rf {

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  ((out << args), ...);
  return out.str();
}

template <typename... Found>
[[noreturn]] void throw_argument_error(const char* op, const char* arg, const std::string& expected,
                                       const Found&... found) {
  throw std::runtime_error(
      concat("rf_kernels.", op, ": argument `", arg, "`: expected ", expected, ", found ", found...));
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline std::string strides_text(const Tensor& t) {
  std::ostringstream out;
  out << "strides (";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.stride(i);
  out << ')';
  return out.str();
}

inline const char* dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

// Neither machine: a compiler traces, and there is nothing to compute.
inline bool is_meta(const Tensor& t) {
  return !t.is_cpu() && !t.is_cuda();
}

inline std::string device_text(const Tensor& t) {
  return t.is_cpu() ? std::string("cpu")
                    : concat(t.is_cuda() ? "cuda:" : "device ", static_cast<int>(t.get_device_index()));
}

}  // namespace rf

// RF_CHECK_ARG(cond, "rope_append", "k", "shape [B, N, H, D]", shape_text(k))
#define RF_CHECK_ARG(cond, op, arg, expected, ...)                           \
  do {                                                                       \
    if (!(cond)) ::rf::throw_argument_error(op, arg, expected, __VA_ARGS__); \
  } while (0)

namespace rf {
const char* cuda_error_text(int code);

// What a build lacks, in the one wording for it: errors, last_dispatch() and the doctor quote these.
inline constexpr const char* kNoCudaPart = "this build has no CUDA part (RF_CUDA=OFF, or no nvcc was found)";
inline constexpr const char* kNoHopperPart =
    "this build has no Hopper kernels (RF_HOPPER=OFF, or no CUTLASS headers were found)";

// What a launcher returned becomes an exception; nothing exits the process.
inline void check_cuda(const char* op, const CudaStatus& status) {
  if (status.driver != 0)
    throw std::runtime_error(
        concat("rf_kernels.", op, ": ", status.call, " failed: CUresult ", status.driver));
  if (!status.ok())
    throw std::runtime_error(concat("rf_kernels.", op, ": ", status.call, " failed: CUDA error ", status.code,
                                    ": ", cuda_error_text(status.code)));
}

// Why this library's CUDA runtime does not run here, nullptr when it does. It is linked statically, hence not
// torch's: on a driver that is older than the nvcc of the build torch may run and this library not.
const char* cuda_problem();
// Whether the build has code that a device runs.
bool cuda_has_code(int32_t device_index);
// Of a device; 0 where there is none.
int cuda_capability_major(int32_t device_index);

// a * b below 2^31, for sizes of any tensor: an empty one may claim sizes whose product overflows.
inline bool product_fits_int32(int64_t a, int64_t b) {
  return a <= INT32_MAX && b <= INT32_MAX && a * b <= INT32_MAX;
}

inline void check_dim(const char* op, const char* arg, const Tensor& t, int64_t dim, const char* layout) {
  RF_CHECK_ARG(t.dim() == dim, op, arg, concat(dim, " dimensions ", layout), shape_text(t));
}
inline void check_size(const char* op, const char* arg, const Tensor& t, int64_t dim, int64_t size,
                       const char* layout) {
  RF_CHECK_ARG(t.size(dim) == size, op, arg, concat("size ", size, " in dimension ", dim, " of ", layout),
               shape_text(t));
}
inline void check_dtype(const char* op, const char* arg, const Tensor& t, ScalarType dtype) {
  RF_CHECK_ARG(t.scalar_type() == dtype, op, arg, concat("dtype ", dtype_text(dtype)),
               dtype_text(t.scalar_type()));
}
inline void check_same_device(const char* op, const char* arg, const Tensor& t, const Tensor& like) {
  RF_CHECK_ARG(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, arg,
               concat("a tensor on ", device_text(like)), device_text(t));
}
inline void check_last_dim_contiguous(const char* op, const char* arg, const Tensor& t) {
  RF_CHECK_ARG(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, op, arg,
               "a last dimension with stride 1", strides_text(t));
}

// [first, one past last) byte that a strided tensor can touch.
inline std::pair<const char*, const char*> byte_range(const Tensor& t) {
  const char* lo = static_cast<const char*>(t.const_data_ptr());
  if (lo == nullptr) return {lo, lo};  // a meta tensor, while a compiler traces
  const char* hi = lo;
  const int64_t size = static_cast<int64_t>(t.element_size());
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {lo, lo};
    const int64_t span = (t.size(i) - 1) * t.stride(i) * size;
    if (span > 0)
      hi += span;
    else
      lo += span;
  }
  return {lo, hi + size};
}

// A tensor that is written must not overlap another argument: the result would depend on the order of
// threads.
inline void check_no_overlap(const char* op, const char* arg, const Tensor& written, const char* other_arg,
                             const Tensor& other) {
  const auto [a0, a1] = byte_range(written);
  const auto [b0, b1] = byte_range(other);
  RF_CHECK_ARG(a0 == a1 || b0 == b1 || a1 <= b0 || b1 <= a0, op, arg,
               concat("memory apart from `", other_arg, "`"), "overlapping memory");
}

// Each element of a written tensor has an address of its own (an expanded or self-overlapping view has not).
inline void check_no_self_overlap(const char* op, const char* arg, const Tensor& t) {
  // Sufficient and simple: sorted by stride, each dimension steps over everything below it.
  int64_t order[16];
  int64_t n = 0;
  for (int64_t i = 0; i < t.dim() && n < 16; ++i)
    if (t.size(i) > 1) order[n++] = i;
  for (int64_t i = 1; i < n; ++i)
    for (int64_t j = i; j > 0 && t.stride(order[j]) < t.stride(order[j - 1]); --j)
      std::swap(order[j], order[j - 1]);
  int64_t extent = 0;
  for (int64_t i = 0; i < n; ++i) {
    RF_CHECK_ARG(t.stride(order[i]) > extent, op, arg, "no two elements at one address", strides_text(t));
    extent += (t.size(order[i]) - 1) * t.stride(order[i]);
  }
}
}  // namespace rf
