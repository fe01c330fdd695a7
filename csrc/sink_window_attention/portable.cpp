#include "csrc/sink_window_attention/portable.h"

#include <limits>
namespace rf::sink_window_attention {
namespace {

using torch::stable::copy_;
using torch::stable::fill_;
using torch::stable::new_empty;
using torch::stable::new_zeros;

// torch::stable::contiguous is a call of the dispatcher even where there is nothing to do.
Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

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

KeyBias bias(const Problem& p, const KeyIntervals& intervals, int i) {
  if (!p.kv_bias.has_value()) return {};
  return keys(*p.kv_bias, intervals, i);
}

// ---- Rows of their own.

bool has_rows(const Problem& p) {
  return p.row_kv_tokens.has_value() && p.chunks[0].keys.count == 1;
}
bool is_masked(const Problem& p) {
  return !p.q.is_cpu() && (p.row_kv_tokens.has_value() || p.kv_bias.has_value()) &&
         p.chunks[0].keys.count == 1;
}

Tensor sample(const Tensor& t, int64_t b) {
  return slice(t, 0, b, b + 1);
}

// Row b as a call of its own (CPU).
Problem row_of(const Problem& p, int64_t b) {
  const int64_t tokens = static_cast<const int32_t*>(p.row_kv_tokens->const_data_ptr())[b];
  KeyIntervals seen;
  push_interval(seen, 0, tokens);
  Problem row{
      sample(p.q, b), sample(p.k, b), sample(p.v, b), p.softmax_scale, {{0, p.q.size(1), seen}}, {}, {}, {}};
  if (p.kv_bias.has_value()) row.kv_bias = sample(*p.kv_bias, b);
  return row;
}

Attended attend_each(const Problem& p, const Backend& backend) {
  const int64_t batch = p.q.size(0), queries = p.q.size(1), heads = p.q.size(2);
  const Attended whole{new_empty(p.q, p.q.sizes()), new_empty(p.q, {batch, heads, queries}, lse_dtype(p.q))};
  for (int64_t b = 0; b < batch; ++b) {
    const Attended row = attend(row_of(p, b), backend);
    Tensor out = sample(whole.out, b), lse = sample(whole.lse, b);
    copy_(out, row.out);
    copy_(lse, row.lse);
  }
  return whole;
}

Gradients attend_each_backward(const Tensor& grad_out, const Problem& p, const Attended& whole,
                               const Backend& backend) {
  const Gradients grad{new_empty(p.q, p.q.sizes()), new_empty(p.k, p.k.sizes()), new_empty(p.v, p.v.sizes())};
  for (int64_t b = 0; b < p.q.size(0); ++b) {
    const Gradients row = attend_backward(sample(grad_out, b), row_of(p, b),
                                          {sample(whole.out, b), sample(whole.lse, b)}, backend);
    Tensor q = sample(grad.q, b), k = sample(grad.k, b), v = sample(grad.v, b);
    copy_(q, row.q);
    copy_(k, row.k);
    copy_(v, row.v);
  }
  return grad;
}

// Rows of their own where the host must not wait for their lengths (CUDA), and a bias of keys there: all
// keys, those behind a row's end with zeros for what they hold and a bias of -inf. In a row that sees no key
// nothing is masked, and its result is set: no kernel meets an empty softmax.
struct MaskedKeys {
  const KeyIntervals& seen;
  std::optional<Tensor> valid;  // bool [B, T], of rows of their own
  Tensor empty;                 // bool [B]
  Tensor bias;                  // float [B, T]

  explicit MaskedKeys(const Problem& p) : seen(p.chunks[0].keys) {
    const Tensor zero = number(p.q, 0.0, ScalarType::Float),
                 hidden = number(p.q, -std::numeric_limits<double>::infinity(), ScalarType::Float);
    if (p.row_kv_tokens.has_value()) {
      Tensor rows = *p.row_kv_tokens, ones = new_empty(rows, {seen.end[0]});
      fill_(ones, 1.0);
      const Tensor count = call_aten("aten::cumsum", "", 1, ones, int64_t{0})[0];
      valid = call_aten("aten::ge", "Tensor", 1, torch::stable::unsqueeze(rows, 1), count)[0];
      bias = where(*valid, p.kv_bias.value_or(zero), hidden);
    } else {
      bias = keys(*p.kv_bias, seen, 0);
    }
    const Tensor none = call_aten("aten::eq", "Tensor", 1, bias, hidden)[0];
    empty = call_aten("aten::all", "dim", 1, none, int64_t{1})[0];
    bias = rows_of(bias, 0.0);
  }

  static Tensor where(const Tensor& mask, const Tensor& yes, const Tensor& no) {
    return call_aten("aten::where", "self", 1, mask, yes, no)[0];
  }
  static Tensor number(const Tensor& like, double value, ScalarType dtype) {
    Tensor x = new_empty(like, {1}, dtype);
    fill_(x, value);
    return x;
  }
  // The keys that any row sees; zeros behind a row's end. For values and gradients too.
  Tensor of(const Tensor& kv) const {
    const Tensor all = keys(kv, seen, 0);
    if (!valid.has_value()) return all;
    Tensor mask = *valid;
    mask = torch::stable::unsqueeze(torch::stable::unsqueeze(mask, 2), 3);
    return where(mask, all, number(kv, 0.0, kv.scalar_type()));
  }
  // t with `value` in the rows that see no key. Rows are dimension 0.
  Tensor rows_of(const Tensor& t, double value) const {
    Tensor mask = empty;
    while (mask.dim() < t.dim()) mask = torch::stable::unsqueeze(mask, mask.dim());
    return where(mask, number(t, value, t.scalar_type()), t);
  }
};

Attended attend_masked(const Problem& p, const Backend& backend) {
  const MaskedKeys masked(p);
  const Attended result = backend.forward(p.q, masked.of(p.k), masked.of(p.v), masked.bias, p.softmax_scale);
  return {dense(masked.rows_of(result.out, 0.0)),
          dense(masked.rows_of(result.lse, -std::numeric_limits<double>::infinity()))};
}

// For the backward kernels, which form exp(logit - lse): a query that sees nothing has no weights.
Tensor without_empty(const Tensor& lse) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  return replace_infinities(lse, kInf, kInf);
}

Gradients attend_masked_backward(const Tensor& grad_out, const Problem& p, const Attended& whole,
                                 const Backend& backend) {
  const MaskedKeys masked(p);
  const Gradients grad = backend.backward(dense(grad_out), p.q, masked.of(p.k), masked.of(p.v), masked.bias,
                                          {whole.out, without_empty(whole.lse)}, p.softmax_scale);
  const Gradients all{dense(masked.rows_of(grad.q, 0.0)), new_zeros(p.k, p.k.sizes()),
                      new_zeros(p.v, p.v.sizes())};
  Tensor dk = keys(all.k, masked.seen, 0), dv = keys(all.v, masked.seen, 0);
  copy_(dk, masked.of(grad.k));
  copy_(dv, masked.of(grad.v));
  return all;
}

}  // namespace

Attended attend(const Problem& p, const Backend& backend) {
  if (!is_empty(p) && is_masked(p)) return attend_masked(p, backend);
  if (!is_empty(p) && has_rows(p)) return attend_each(p, backend);
  if (!is_empty(p) && is_dense(p)) {
    const KeyIntervals& seen = p.chunks[0].keys;
    const Attended result =
        backend.forward(p.q, keys(p.k, seen, 0), keys(p.v, seen, 0), bias(p, seen, 0), p.softmax_scale);
    return {dense(result.out), dense(result.lse)};
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
    const Attended first =
        backend.forward(q, keys(p.k, seen, 0), keys(p.v, seen, 0), bias(p, seen, 0), p.softmax_scale);
    if (seen.count == 1) {
      Tensor out = rows.out, lse = rows.lse;
      copy_(out, first.out);
      copy_(lse, first.lse);
    } else {
      const Attended second =
          backend.forward(q, keys(p.k, seen, 1), keys(p.v, seen, 1), bias(p, seen, 1), p.softmax_scale);
      backend.merge(first, second, rows);
    }
  }
  return whole;
}

Gradients attend_backward(const Tensor& grad_out, const Problem& p, const Attended& whole,
                          const Backend& backend) {
  if (!is_empty(p) && is_masked(p)) return attend_masked_backward(grad_out, p, whole, backend);
  if (!is_empty(p) && has_rows(p)) return attend_each_backward(grad_out, p, whole, backend);
  const Tensor dout = dense(grad_out);  // autograd hands over expanded gradients, e.g. of sum()
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
                          dense(slice(lse, 2, chunk.begin, chunk.end))};
      for (int i = 0; i < chunk.keys.count; ++i) {
        const Gradients part =
            backend.backward(dout_rows, q, keys(p.k, chunk.keys, i), keys(p.v, chunk.keys, i),
                             bias(p, chunk.keys, i), rows, p.softmax_scale);
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
