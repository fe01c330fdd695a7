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

// The same on the FMA units, for x up to 127: 2^x = 2^n p(f), n = floor(x), f = x - n, p of degree 3. Rounded
// to bfloat16 its error is no larger than exp2_approx's, whose 2 ulp the rounding hides as well: p is fitted
// to that, exact at 0 and where bfloat16's first rounding boundary lies, within 2.9e-4 elsewhere. exp2(-inf)
// = 0, results below 2^-126 are 0 or below 2^-125, NaN stays.
RF_HD float exp2_polynomial(float x) {
  constexpr float kC1 = 0x1.62e7c4p-1f, kC2 = 0x1.e1e05ep-3f, kC3 = 0x1.22ae56p-4f;
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, 0fC2FE0000;" : "+f"(x));  // -127
  constexpr float kMagic = 12582912.f;         // 1.5 * 2^23: the low bits of a sum with it are an integer
  const float shifted = __fadd_rd(x, kMagic);  // rounds down
  const float f = x - (shifted - kMagic);
  const float power = __int_as_float((__float_as_int(shifted) << 23) + 0x3F800000);  // 2^n; n = -127 gives 0
#else
  x = x < -127.f ? -127.f : x;
  const float n = std::floor(x), f = x - n;
  const float power = n < -126.f ? 0.f : std::ldexp(1.f, n != n ? 0 : static_cast<int>(n));
#endif
  return (((kC3 * f + kC2) * f + kC1) * f + 1.f) * power;
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
