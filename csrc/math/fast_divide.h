// Division of 31-bit numbers by a divisor that is known on the host: a product and a shift.
#pragma once

#include <cstdint>

#include "csrc/math/host_device.h"

namespace rf {

// multiplier = ceil(2^shift / divisor) with 2^(shift - 31) >= divisor: the error of n * multiplier / 2^shift
// is below 1 / divisor for every n < 2^31, so the quotient is exact.
struct FastDivide {
  uint32_t divisor = 1, multiplier = 1u << 31, shift = 31;

  FastDivide() = default;
  FastDivide(int64_t by)  // not explicit: a number is its own divisor
      : divisor(by > 0 ? static_cast<uint32_t>(by) : 1), shift(31) {
    while ((uint64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  RF_HD int32_t quotient(int32_t n) const {
    return static_cast<int32_t>((uint64_t{static_cast<uint32_t>(n)} * multiplier) >> shift);
  }
  RF_HD int32_t remainder(int32_t n, int32_t quotient) const {
    return n - quotient * static_cast<int32_t>(divisor);
  }
};

}  // namespace rf
