// mbarriers in shared memory. A phase is complete when all expected arrivals have come and all announced
// transaction bytes have landed; `wait` takes the parity of the phase that it waits for.
#pragma once

#include "csrc/arch/platform.h"

namespace rf::arch {

RF_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  chip::mbarrier_init(barrier, arrivals);
}
RF_DEVICE void fence_mbarrier_init() {
  chip::fence_mbarrier_init();
}
RF_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  chip::mbarrier_arrive(barrier, 0);
}
RF_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  chip::mbarrier_arrive(barrier, bytes);
}
RF_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  chip::mbarrier_wait(barrier, parity);
}

}  // namespace rf::arch
