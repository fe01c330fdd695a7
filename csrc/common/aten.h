// Calls of PyTorch's own ops through the stable dispatcher.
#pragma once

#include <vector>

#include "csrc/common/torch_stable.h"

namespace rf {

// `returns` is the number of results, all of them tensors (owned and released here). Optional arguments
// at the end of a schema may be left out, those that later versions of torch append among them: a zero in the
// stack is None.
template <typename... Args>
std::vector<Tensor> call_aten(const char* op, const char* overload, size_t returns, const Args&... args) {
  constexpr size_t kStack = 24;  // no fewer than the arguments or the results of any op called here
  static_assert(sizeof...(Args) <= kStack);
  StableIValue stack[kStack] = {torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
  std::vector<Tensor> tensors;
  tensors.reserve(returns);
  for (size_t i = 0; i < returns; ++i) tensors.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return tensors;
}

}  // namespace rf
