// mbarriers in shared memory. A phase is complete when all expected arrivals have come and all announced
// transaction bytes have landed; `wait` takes the parity of the phase that it waits for.
#pragma once

#include "csrc/arch/platform.h"

#include <cutlass/arch/barrier.h>

namespace rf::arch {

RF_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  cutlass::arch::ClusterTransactionBarrier::init(barrier, arrivals);
}
// Makes the initialisation visible to the async proxy; a CTA barrier then makes it visible to the other
// threads.
RF_DEVICE void fence_mbarrier_init() {
  cutlass::arch::fence_barrier_init();
}
RF_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  cutlass::arch::ClusterTransactionBarrier::arrive(barrier);
}
RF_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}
RF_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  cutlass::arch::ClusterTransactionBarrier::wait(barrier, parity);
}

}  // namespace rf::arch
