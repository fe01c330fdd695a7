// Eight floats at a time on AVX2, FMA and F16C: the same bits as to_acc, from_acc and the operations of
// rounding.h element by element. Host code alone; RF_SIMD says whether the target has it.
#pragma once

#include <type_traits>

#include "csrc/math/dtype.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__CUDACC__)
#define RF_SIMD 1
#include <immintrin.h>

namespace rf::simd {

using F8 = __m256;
constexpr int kWidth = 8;

RF_HD F8 load(const float* p) {
  return _mm256_loadu_ps(p);
}
RF_HD F8 load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
RF_HD F8 load(const f16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Rounded to T, as floats. A NaN whose lower 16 bits are not zero is rounded to anything: one that was
// widened from T, or that the processor has made of such numbers, has zeros there and stays a NaN.
template <typename T>
RF_HD F8 round_number(F8 v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
  } else if constexpr (std::is_same_v<T, f16>) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  } else {
    return v;
  }
}

// bf16's one NaN where `v` is one.
template <typename T>
RF_HD F8 canonical(F8 v) {
  if constexpr (!std::is_same_v<T, bf16>) return v;
  const F8 nan = _mm256_castsi256_ps(_mm256_set1_epi32(kBf16NaN << 16));
  return _mm256_blendv_ps(v, nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

// The bits of to_acc(from_acc<T>(v)).
template <typename T>
RF_HD F8 round(F8 v) {
  if constexpr (!std::is_same_v<T, bf16>) return round_number<T>(v);
  const F8 nan = _mm256_castsi256_ps(_mm256_set1_epi32(kBf16NaN << 16));
  return _mm256_blendv_ps(round_number<T>(v), nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

// Of numbers that T holds.
RF_HD void store_exact(float* p, F8 v) {
  _mm256_storeu_ps(p, v);
}
RF_HD void store_exact(bf16* p, F8 v) {
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
RF_HD void store_exact(f16* p, F8 v) {
  const __m128i packed = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

// Whether `n` elements, a multiple of 16 bytes, are all finite.
template <typename T>
RF_HD bool all_finite(const T* p, int64_t n) {
  const __m256i exponent = sizeof(T) == 4 ? _mm256_set1_epi32(0x7F800000)
                                          : _mm256_set1_epi16(std::is_same_v<T, bf16> ? 0x7F80 : 0x7C00);
  const auto ones = [&](__m256i bits) {
    const __m256i masked = _mm256_and_si256(bits, exponent);
    return sizeof(T) == 4 ? _mm256_cmpeq_epi32(masked, exponent) : _mm256_cmpeq_epi16(masked, exponent);
  };
  constexpr int kStep = 32 / sizeof(T);
  __m256i found = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    found = _mm256_or_si256(found, ones(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i))));
  if (i < n)
    found = _mm256_or_si256(
        found, ones(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)))));
  return _mm256_testz_si256(found, found) != 0;
}

}  // namespace rf::simd
#endif
