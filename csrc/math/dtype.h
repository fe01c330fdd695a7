// The storage types of all ops: their names at run time, half precision, and the accumulator each computes
// in.
//
// Rounding is to nearest even on both machines: `from_acc` is the only place where a value is rounded to its
// storage type, so a kernel's rounding points can be read off its calls. On the host, fp16 uses F16C where
// the target has it; the software path gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/math/host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace rf {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype : int32_t { kBFloat16, kFloat16, kFloat32, kFloat64 };

RF_HD constexpr int dtype_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// From a name at run time to code: f.operator()<T>(), f being a lambda []<typename T>() { ... }.
template <typename F>
auto with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f.template operator()<bf16>();
    case Dtype::kFloat16:
      return f.template operator()<f16>();
    case Dtype::kFloat32:
      return f.template operator()<float>();
    case Dtype::kFloat64:
      break;
  }
  return f.template operator()<double>();
}

RF_HD uint32_t float_to_bits(float v) {
  uint32_t u;
  memcpy(&u, &v, sizeof(u));
  return u;
}
RF_HD float bits_to_float(uint32_t u) {
  float v;
  memcpy(&v, &u, sizeof(v));
  return v;
}

// ---- bf16: the upper half of a float
RF_HD float bf16_to_float(bf16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}

// The one NaN that rounding to bf16 makes, on both machines: what cvt.rn.bf16 of the GPU gives.
inline constexpr int kBf16NaN = 0x7FFF;

RF_HD bf16 float_to_bf16(float v) {
#if defined(__CUDA_ARCH__)
  return bf16{__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  const uint32_t u = float_to_bits(v);
  // Branch-free, so that the compiler vectorises it: round to nearest even by carry.
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const bool nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
  return bf16{static_cast<uint16_t>(nan ? kBf16NaN : rounded)};
#endif
}

// ---- fp16
RF_HD float f16_to_float_portable(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1Fu;
  const uint32_t mantissa = x.bits & 0x3FFu;
  if (exponent == 0x1Fu)
    return bits_to_float(sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  // Subnormal: mantissa * 2^-24 is exact in float.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  return bits_to_float(sign | float_to_bits(magnitude));
}

RF_HD f16 float_to_f16_portable(float v) {
  const uint32_t u = float_to_bits(v);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return f16{static_cast<uint16_t>(sign | 0x7E00u | ((a >> 13) & 0x3FFu))};
  if (a >= 0x477FF000u) return f16{static_cast<uint16_t>(sign | 0x7C00u)};  // >= 65520 rounds to infinity
  if (a < 0x38800000u) {
    // Below 2^-14: adding 0.5 aligns the fp16 subnormal grid (2^-24) with the last bit of the float, which
    // then rounds to even.
    const float aligned = bits_to_float(a) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3F000000u))};
  }
  const uint32_t rounded = a - 0x38000000u + 0xFFFu + ((a >> 13) & 1u);
  return f16{static_cast<uint16_t>(sign | (rounded >> 13))};
}

RF_HD float f16_to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#elif defined(__F16C__) && !defined(__CUDACC__)
  return _cvtsh_ss(x.bits);
#else
  return f16_to_float_portable(x);
#endif
}

RF_HD f16 float_to_f16(float v) {
#if defined(__CUDA_ARCH__)
  return f16{__half_as_ushort(__float2half_rn(v))};
#elif defined(__F16C__) && !defined(__CUDACC__)
  return f16{static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
#else
  return float_to_f16_portable(v);
#endif
}

// ---- accumulators
// Half precision and float compute in float; double computes in double (the float64 oracle runs through the
// same code).
template <typename T>
struct acc {
  using type = float;
};
template <>
struct acc<double> {
  using type = double;
};
template <typename T>
using acc_t = typename acc<T>::type;

RF_HD float to_acc(bf16 x) {
  return bf16_to_float(x);
}
RF_HD float to_acc(f16 x) {
  return f16_to_float(x);
}
RF_HD float to_acc(float x) {
  return x;
}
RF_HD double to_acc(double x) {
  return x;
}

template <typename T, typename A>
RF_HD T from_acc(A v) {
  return static_cast<T>(v);
}
template <>
RF_HD bf16 from_acc<bf16, float>(float v) {
  return float_to_bf16(v);
}
template <>
RF_HD f16 from_acc<f16, float>(float v) {
  return float_to_f16(v);
}

// Finite test by exponent bits: survives any floating-point optimisation flag.
RF_HD bool is_finite(float v) {
  return (float_to_bits(v) & 0x7F800000u) != 0x7F800000u;
}
RF_HD bool is_finite(double v) {
  uint64_t u;
  memcpy(&u, &v, sizeof(u));
  return (u & 0x7FF0000000000000ull) != 0x7FF0000000000000ull;
}

}  // namespace rf
