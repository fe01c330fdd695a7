// Rows of storage elements to accumulators and back, on the host. Same bits as to_acc and from_acc element by
// element; written out where the compiler does not vectorise those (fp16 is one F16C instruction for eight).
#pragma once

#include <type_traits>

#include "csrc/math/dtype.h"

namespace rf {

template <typename T>
inline void row_to_acc(const T* from, acc_t<T>* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__) && defined(__AVX__) && !defined(__CUDACC__)
  if constexpr (std::is_same_v<T, f16>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = to_acc(from[i]);
}

template <typename T>
inline void row_from_acc(const acc_t<T>* from, T* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__) && defined(__AVX__) && !defined(__CUDACC__)
  if constexpr (std::is_same_v<T, f16>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(to + i),
          _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) to[i] = from_acc<T>(from[i]);
}

}  // namespace rf
