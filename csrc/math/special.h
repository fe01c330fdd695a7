// exp2, log2 and max as the chip's special function unit and ALU give them. Host code gets the same functions
// of the C library.
#pragma once

#include <cmath>

#include "csrc/math/host_device.h"

namespace rf {

// MUFU.EX2: 2 ulp, results below 2^-126 become 0; exp2(-inf) = 0.
RF_HD float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// MUFU.LG2: log2(0) = -inf.
RF_HD float log2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::log2(x);
#endif
}

// FMNMX. The chip drops a NaN operand; the model keeps it, so that a poisoned score cannot hide behind a
// maximum.
RF_HD float max2(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a != a || b != b ? NAN : (a > b ? a : b);
#endif
}

}  // namespace rf
