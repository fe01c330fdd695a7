// Arithmetic whose rounding points the compiler may not move: nvcc contracts a * b + c on its own (the host
// is compiled with -ffp-contract=off), and a sum that is promised to round twice must do so on both machines.
#pragma once

#include <cmath>

#include "csrc/math/host_device.h"

namespace rf {

RF_HD float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
RF_HD double mul_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
RF_HD float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
RF_HD double add_rn(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
// a * b + c, rounded once.
RF_HD float fma_rn(float a, float b, float c) {
  return fmaf(a, b, c);
}
RF_HD double fma_rn(double a, double b, double c) {
  return fma(a, b, c);
}

}  // namespace rf
