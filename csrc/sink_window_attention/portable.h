// Attention over intervals of keys on kernels that PyTorch has: one dense pass per interval, merged by LSE.
#pragma once

#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "csrc/common/aten.h"
#include "csrc/common/torch_stable.h"
#include "csrc/math/key_intervals.h"
#include "csrc/sink_window_attention/values.h"

namespace rf::sink_window_attention {

inline constexpr const char* kOp = "sink_window_attention";

// Queries [begin, end) and the keys they see.
struct QueryChunk {
  int64_t begin, end;
  KeyIntervals keys;
};

// A checked call.
struct Problem {
  Tensor q, k, v;  // [B, Nq, Hq, D], [B, T, Hkv, D] twice: strided views
  double softmax_scale;
  std::vector<QueryChunk> chunks;  // ascending, covering [0, Nq)
  // Rows of their own: sample b sees keys [0, row_kv_tokens[b]), int32 [B] without gaps. `chunks` is then one
  // chunk over all keys. On the CPU the values have been checked; on CUDA nobody has seen them.
  std::optional<Tensor> row_kv_tokens;
  // Added to the logits of a key: float [B, T] with a unit stride in T. One chunk alone.
  std::optional<Tensor> kv_bias;
  // Those of v, and hence of out, that the caller asked for.
  ValueColumns values;
};

struct Attended {
  Tensor out, lse;  // [B, n, Hq, D] in the dtype of q; [B, Hq, n] natural log, float (double for double)
};
struct Gradients {
  Tensor q, k, v;  // of the shapes of q, k, v
};

// Float [B, T], added to the logits of a key. Optional.
using KeyBias = std::optional<Tensor>;

// What a device gives: dense attention of q over all of k and v, and the two reductions around it. A query
// whose logits are all -inf gets out = 0 and lse = -inf, as one that sees no key.
struct Backend {
  Attended (*forward)(const Tensor& q, const Tensor& k, const Tensor& v, const KeyBias& bias,
                      double softmax_scale);
  // With the LSE and output of *all* keys, each interval's gradients are its share of the whole: they add up.
  Gradients (*backward)(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                        const KeyBias& bias, const Attended& whole, double softmax_scale);
  // rows <- the two parts merged. Neither part is empty.
  void (*merge)(const Attended& first, const Attended& second, const Attended& rows);
  void (*accumulate)(const Tensor& sum, const Tensor& term);  // sum += term, in the dtype of sum
};

extern const Backend cpu_backend;
extern const Backend cuda_flash_backend;      // half precision; takes no bias
extern const Backend cuda_efficient_backend;  // float, and what has a bias

Attended attend(const Problem& problem, const Backend& backend);
Gradients attend_backward(const Tensor& grad_out, const Problem& problem, const Attended& whole,
                          const Backend& backend);

inline Tensor slice(const Tensor& t, int64_t dim, int64_t begin, int64_t end) {
  if (begin == 0 && end == t.size(dim)) return t;
  Tensor view = t;  // another handle of the same tensor: narrow() takes a mutable one
  return torch::stable::narrow(view, dim, begin, end - begin);
}

// t with other values for its infinities.
inline Tensor replace_infinities(const Tensor& t, double positive, double negative) {
  const std::optional<double> nan = std::numeric_limits<double>::quiet_NaN(), above = positive,
                              below = negative;
  return call_aten("aten::nan_to_num", "", 1, t, nan, above, below)[0];
}

inline ScalarType lse_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace rf::sink_window_attention
