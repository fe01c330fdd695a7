// Small kernels that test the model itself: what the attention kernel does not use, and one misuse per check.
#pragma once

#include <cstdint>
#include <string>

#include "tests/chip/model/launch.h"

namespace chip_tests {

// `fault` plants the probe's fault. Misuse probes always misbehave; they must end in a chip::Fault.
chip::LaunchStats run_probe(const std::string& name, const uint16_t* in, uint16_t* out, bool fault,
                            chip::LaunchOptions& options);

// The low and high words that the kernels build, as one descriptor.
uint64_t operand_desc(bool mn_major, uint32_t address, uint32_t block_bytes, uint32_t step_bytes);

}  // namespace chip_tests
