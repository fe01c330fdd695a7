#include "csrc/sink_window_attention/portable.h"

#include <limits>
namespace rf::sink_window_attention {
namespace {

using torch::stable::contiguous;
using torch::stable::copy_;
using torch::stable::fill_;
using torch::stable::new_empty;
using torch::stable::new_zeros;

bool is_empty(const Problem& p) {
  return p.q.numel() == 0;
}

// One chunk over one interval needs no merge: the kernel's result is the result.
bool is_dense(const Problem& p) {
  return p.chunks.size() == 1 && p.chunks[0].keys.count == 1;
}

Tensor keys(const Tensor& kv, const KeyIntervals& intervals, int i) {
  return slice(kv, 1, intervals.begin[i], intervals.end[i]);
}

// For the backward kernels, which form exp(logit - lse): a query that sees nothing has no weights.
Tensor without_empty(const Tensor& lse) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  return replace_infinities(lse, kInf, kInf);
}

}  // namespace

Attended attend(const Problem& p, const Backend& backend) {
  if (!is_empty(p) && is_dense(p)) {
    const KeyIntervals& seen = p.chunks[0].keys;
    const Attended result = backend.forward(p.q, keys(p.k, seen, 0), keys(p.v, seen, 0), p.softmax_scale);
    return {contiguous(result.out), contiguous(result.lse)};
  }
  const int64_t batch = p.q.size(0), queries = p.q.size(1), heads = p.q.size(2);
  const Attended whole{new_empty(p.q, p.q.sizes()), new_empty(p.q, {batch, heads, queries}, lse_dtype(p.q))};
  if (is_empty(p)) return whole;
  for (const QueryChunk& chunk : p.chunks) {
    const Tensor q = slice(p.q, 1, chunk.begin, chunk.end);
    const Attended rows{slice(whole.out, 1, chunk.begin, chunk.end),
                        slice(whole.lse, 2, chunk.begin, chunk.end)};
    const KeyIntervals& seen = chunk.keys;
    if (seen.count == 0) {  // the empty sum
      fill_(rows.out, 0.0);
      fill_(rows.lse, -std::numeric_limits<double>::infinity());
      continue;
    }
    const Attended first = backend.forward(q, keys(p.k, seen, 0), keys(p.v, seen, 0), p.softmax_scale);
    if (seen.count == 1) {
      Tensor out = rows.out, lse = rows.lse;
      copy_(out, first.out);
      copy_(lse, first.lse);
    } else {
      const Attended second = backend.forward(q, keys(p.k, seen, 1), keys(p.v, seen, 1), p.softmax_scale);
      backend.merge(first, second, rows);
    }
  }
  return whole;
}

Gradients attend_backward(const Tensor& grad_out, const Problem& p, const Attended& whole,
                          const Backend& backend) {
  const Tensor dout = contiguous(grad_out);  // autograd hands over expanded gradients, e.g. of sum()
  // Keys of the sink are seen by every chunk: many terms, so half precision sums in float and rounds once.
  const ScalarType dtype = p.q.scalar_type();
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  const ScalarType sum_dtype = half && !is_dense(p) ? ScalarType::Float : dtype;
  Gradients grad{new_empty(p.q, p.q.sizes()), new_zeros(p.k, p.k.sizes(), sum_dtype),
                 new_zeros(p.v, p.v.sizes(), sum_dtype)};
  if (!is_empty(p)) {
    const Tensor lse = without_empty(whole.lse);
    for (const QueryChunk& chunk : p.chunks) {
      Tensor dq = slice(grad.q, 1, chunk.begin, chunk.end);
      if (chunk.keys.count == 0) fill_(dq, 0.0);
      const Tensor q = slice(p.q, 1, chunk.begin, chunk.end);
      const Tensor dout_rows = slice(dout, 1, chunk.begin, chunk.end);
      const Attended rows{slice(whole.out, 1, chunk.begin, chunk.end),
                          contiguous(slice(lse, 2, chunk.begin, chunk.end))};
      for (int i = 0; i < chunk.keys.count; ++i) {
        const Gradients part = backend.backward(dout_rows, q, keys(p.k, chunk.keys, i),
                                                keys(p.v, chunk.keys, i), rows, p.softmax_scale);
        Tensor dk = keys(grad.k, chunk.keys, i), dv = keys(grad.v, chunk.keys, i);
        if (i == 0)
          copy_(dq, part.q);
        else
          backend.accumulate(dq, part.q);
        if (is_dense(p)) {
          copy_(dk, part.k);
          copy_(dv, part.v);
        } else {
          backend.accumulate(dk, part.k);
          backend.accumulate(dv, part.v);
        }
      }
    }
  }
  if (sum_dtype != dtype) {
    grad.k = torch::stable::to(grad.k, dtype);
    grad.v = torch::stable::to(grad.v, dtype);
  }
  return grad;
}

}  // namespace rf::sink_window_attention
