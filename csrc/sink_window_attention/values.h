// Values of fewer columns than the keys: every backend attends with values as wide as the keys, and the
// columns in question are taken from what it gives.
#pragma once

#include <cstdint>

#include "csrc/common/torch_stable.h"

namespace rf::sink_window_attention {

// Where the caller's values are among the columns of those that a backend gets.
struct ValueColumns {
  int64_t begin = 0, count = 0;

  // Columns of a wide tensor, without gaps.
  Tensor of(const Tensor& wide) const {
    if (count == wide.size(3)) return wide;
    Tensor view = wide;  // another handle of the same tensor: narrow() takes a mutable one
    return torch::stable::contiguous(torch::stable::narrow(view, 3, begin, count));
  }
  // And back, with zeros beside them: they change no product that is formed, forward or backward.
  Tensor widened(const Tensor& t, int64_t dim) const {
    if (count == dim) return t;
    return torch::stable::pad(t, {begin, dim - begin - count});
  }
};

// Whether v is columns of k's own rows, as where keys and values are one latent.
inline bool inside_keys(const Tensor& k, const Tensor& v, ValueColumns& columns) {
  if (v.size(3) == k.size(3) || v.numel() == 0) return false;
  for (int64_t i = 0; i < 3; ++i)
    if (k.size(i) > 1 && k.stride(i) != v.stride(i)) return false;
  const auto first = reinterpret_cast<uintptr_t>(k.const_data_ptr());
  const auto at = reinterpret_cast<uintptr_t>(v.const_data_ptr());
  if (first == 0) return false;                                    // a meta tensor, while a compiler traces
  const uintptr_t bytes = at - first, element = k.element_size();  // a v before k wraps to far behind it
  if (bytes % element != 0 || bytes / element > static_cast<uintptr_t>(k.size(3) - v.size(3))) return false;
  columns.begin = static_cast<int64_t>(bytes / element);
  return true;
}

// Values as wide as the keys: v itself; or k, where v lies in k's rows, so that nothing is copied; or v with
// zeros behind it.
inline Tensor wide_values(const Tensor& k, const Tensor& v, ValueColumns& columns) {
  columns = {0, v.size(3)};
  return inside_keys(k, v, columns) ? k : columns.widened(v, k.size(3));
}

}  // namespace rf::sink_window_attention
