// From run-time facts (dtype, backend) to code, and the record of what was chosen.
#pragma once

#include <string>

#include "csrc/common/check.h"
#include "csrc/math/dtype.h"

// Runs the body with T bound to the storage type of `scalar_type`; any other dtype is an argument error.
#define RF_DISPATCH_FLOATING(scalar_type, T, op, arg, ...)                                 \
  do {                                                                                     \
    switch (scalar_type) {                                                                 \
      case ::rf::ScalarType::BFloat16: {                                                   \
        using T = ::rf::bf16;                                                              \
        __VA_ARGS__;                                                                       \
        break;                                                                             \
      }                                                                                    \
      case ::rf::ScalarType::Half: {                                                       \
        using T = ::rf::f16;                                                               \
        __VA_ARGS__;                                                                       \
        break;                                                                             \
      }                                                                                    \
      case ::rf::ScalarType::Float: {                                                      \
        using T = float;                                                                   \
        __VA_ARGS__;                                                                       \
        break;                                                                             \
      }                                                                                    \
      case ::rf::ScalarType::Double: {                                                     \
        using T = double;                                                                  \
        __VA_ARGS__;                                                                       \
        break;                                                                             \
      }                                                                                    \
      default:                                                                             \
        ::rf::throw_argument_error(op, arg, "dtype float64, float32, bfloat16 or float16", \
                                   ::rf::dtype_text(scalar_type));                         \
    }                                                                                      \
  } while (0)

namespace rf {

// What served the last call of an op on this thread; read by rf_kernels.last_dispatch(). `op`, `backend` and
// `reason` are string literals: recording costs three pointer stores.
void record_dispatch(const char* op, const char* backend, const char* reason);

// The same where a slower path than the device's own kernel is taken: an error under RF_STRICT=1.
void record_fallback(const char* op, const char* backend, const char* reason);

}  // namespace rf
