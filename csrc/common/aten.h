// Calls of PyTorch's own ops through the stable dispatcher.
#pragma once

#include <string_view>
#include <vector>

#include "csrc/common/torch_stable.h"

namespace rf {

// `returns` has a letter per result of the op's schema: 'T' a tensor, 'i' a number. All tensors are owned
// (and released) here; they come back in order, numbers are dropped.
template <typename... Args>
std::vector<Tensor> call_aten(const char* op, const char* overload, std::string_view returns,
                              const Args&... args) {
  constexpr size_t kMaxReturns = 10;
  StableIValue stack[sizeof...(Args) > kMaxReturns ? sizeof...(Args) : kMaxReturns] = {
      torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack, TORCH_ABI_VERSION));
  std::vector<Tensor> tensors;
  tensors.reserve(returns.size());
  for (size_t i = 0; i < returns.size(); ++i)
    if (returns[i] == 'T') tensors.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return tensors;
}

}  // namespace rf
