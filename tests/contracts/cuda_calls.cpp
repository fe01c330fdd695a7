// How launchers deal with the CUDA runtime (csrc/common/cuda_call.h), on a fake one. Built and run by
// tests/contracts/test_cuda_calls.py; prints what is wrong.
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "csrc/common/cuda_call.h"

namespace {

void first_kernel(int, char) {}
void second_kernel(int, char) {}

int failures = 0;
void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("%s\n", what.c_str());
  ++failures;
}

template <auto kKernel>
rf::CudaStatus opt_in() {
  int bytes = 0;
  const rf::CudaStatus status = rf::opt_in_shared_memory<kKernel>(bytes);
  expect(!status.ok() || bytes == 199500 + 1000 * fake::device, "the device's maximum less static memory");
  return status;
}

rf::CudaStatus launch() {
  return rf::launch_kernel("launch of first_kernel", first_kernel, 2, 32, 0, nullptr, 1000, 7);
}

}  // namespace

int main() {
  // A failed call is named and leaves no error behind; the next call tries again.
  for (const char* name :
       {"cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute"}) {
    fake::failing = name;
    const rf::CudaStatus status = opt_in<first_kernel>();
    expect(status.code == cudaErrorInvalidValue && status.call == fake::failing,
           fake::failing + ": " + status.call);
    expect(fake::last == cudaSuccess, fake::failing + " leaves its error to the next launch");
  }
  fake::failing = "cudaLaunchKernel";
  const rf::CudaStatus failed = launch();
  expect(failed.code == cudaErrorInvalidValue && std::string(failed.call) == "launch of first_kernel",
         "a failed launch is named");
  expect(fake::last == cudaSuccess, "a failed launch leaves its error to the next launch");
  fake::failing.clear();

  // The error of another library is neither taken for ours nor taken away.
  fake::last = cudaErrorInvalidValue;
  expect(launch().ok(), "a good launch reports what another library left behind");
  expect(fake::last == cudaErrorInvalidValue, "a good launch swallows what another library left behind");
  fake::last = cudaSuccess;
  expect(fake::launches == 2 && fake::arguments == 2 * 1007, "arguments arrive in the kernel's types");

  // Once for each device and instantiation, whatever the number of threads.
  fake::limits.clear();
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([t] {
      fake::device = t % 2;
      for (int i = 0; i < 100; ++i) {
        expect(opt_in<first_kernel>().ok(), "first kernel");
        expect(opt_in<second_kernel>().ok(), "second kernel");
      }
    });
  for (std::thread& thread : threads) thread.join();
  expect(fake::limits.size() == 4, "two kernels on two devices");
  for (const auto& [key, value] : fake::limits)
    expect(value == std::pair(1, 199500 + 1000 * key.first),
           "the limit was set " + std::to_string(value.first) + " times");
  return failures;
}
