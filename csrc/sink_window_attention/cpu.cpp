// CPU: PyTorch's flash attention for the CPU per interval of keys; merge and sums are ours.
#include <cstring>
#include <limits>

#include "csrc/common/aten.h"
#include "csrc/common/dispatch.h"
#include "csrc/math/lse_merge.h"
#include "csrc/sink_window_attention/portable.h"

namespace rf::sink_window_attention {
namespace {

using torch::stable::copy_;
using torch::stable::new_empty;

// ---- The same bits at every number of threads and place in the batch.
// The bits of a matrix product depend on how its operands lie to 64 bytes (MKL, float64 and float32), and on
// whether MKL splits it among threads of its own. So every sample is given the same alignment, and so is the
// scratch that the kernel keeps per thread. The shapes of models (rows of 64 bytes, 32 queries or more) need
// no copy for it.

constexpr int64_t kAlignment = 64;
constexpr int64_t kMinQueries =
    32;  // the kernel's smallest query tile: its scratch is a multiple of the tile

bool is_aligned(const Tensor& t, int64_t elements) {
  return elements * static_cast<int64_t>(t.element_size()) % kAlignment == 0;
}

// [B, n, H, D] with rows of zeros up to the smallest query tile: cut off again, and without weight in any
// gradient. By hand: PyTorch's pad is a handful of calls.
Tensor pad_rows(const Tensor& t) {
  const int64_t batch = t.size(0), rows = t.size(1), heads = t.size(2), size = t.element_size();
  if (rows >= kMinQueries) return t;
  const Tensor padded = new_empty(t, {batch, kMinQueries, heads, t.size(3)});
  const int64_t bytes = t.size(3) * size;
  const char* from = static_cast<const char*>(t.const_data_ptr());
  char* to = static_cast<char*>(padded.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t h = 0; h < heads; ++h, to += bytes)
        memcpy(to, from + (b * t.stride(0) + n * t.stride(1) + h * t.stride(2)) * size,
               static_cast<size_t>(bytes));
    const int64_t rest = (kMinQueries - rows) * heads * bytes;
    memset(to, 0, static_cast<size_t>(rest));
    to += rest;
  }
  return padded;
}

// The same with copies of the last row: of a row of zeros and an infinite key the logit would be NaN, and so
// the whole gradient of that key. With a gradient of zero a copy has no weight in it.
Tensor repeat_last_row(const Tensor& t, int64_t dim) {
  const int64_t rows = t.size(dim);
  if (rows >= kMinQueries) return t;
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[static_cast<size_t>(dim)] = kMinQueries;
  const Tensor padded = new_empty(t, sizes);
  Tensor first = slice(padded, dim, 0, rows), others = slice(padded, dim, rows, kMinQueries);
  copy_(first, t);
  copy_(others, slice(t, dim, rows - 1, rows));
  return padded;
}

// t itself where it is aligned, else a copy.
Tensor align(const Tensor& t) {
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment == 0 &&
                       is_aligned(t, t.stride(1)) && (t.size(0) == 1 || is_aligned(t, t.stride(0)));
  if (aligned) return t;
  Tensor copy = new_empty(t, t.sizes());
  return copy_(copy, t);
}

// Whether the samples of a contiguous tensor of this shape all lie alike; else they are taken one by one.
bool samples_align(const Tensor& t) {
  return t.size(0) == 1 || is_aligned(t, t.size(1) * t.size(2) * t.size(3));
}
Tensor sample(const Tensor& t, int64_t b) {
  return slice(t, 0, b, b + 1);
}
void set_sample(const Tensor& t, int64_t b, const Tensor& value) {
  Tensor place = sample(t, b);
  copy_(place, value);
}

// The kernel spreads its units over the threads (forward: a query tile of a head; backward: a key head). A
// single one would run outside of any parallel region, where MKL takes threads for itself; inside a region it
// does not. Task 0 runs on the calling thread.
template <typename F>
void run_units(bool single, const F& f) {
  if (!single) return f();
  torch::stable::parallel_for(0, 2, 1, [&f](int64_t begin, int64_t) {
    if (begin == 0) f();
  });
}

// ---- One interval of keys. The kernels take [B, H, S, D] by strides: a transposed view, no copy.

// [B, X, Y, D] as [B, Y, X, D], of which the first `rows` of Y. Not by way of the dispatcher: a tiny call is
// made of such views.
Tensor swapped(const Tensor& t, int64_t rows) {
  const int64_t sizes[] = {t.size(0), rows, t.size(1), t.size(3)};
  const int64_t strides[] = {t.stride(0), t.stride(2), t.stride(1), t.stride(3)};
  AtenTensorHandle view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 4, sizes, strides, 0, &view));
  return Tensor(view);
}
Tensor swapped(const Tensor& t) {
  return swapped(t, t.size(2));
}

// The first rows of the kernel's LSE, [B, H, n] without gaps. By hand, as above.
Tensor first_rows(const Tensor& lse, int64_t rows) {
  if (lse.size(2) == rows && lse.is_contiguous()) return lse;
  const Tensor first = new_empty(lse, {lse.size(0), lse.size(1), rows});
  const auto copy = [&]<typename A>() {
    const A* from = static_cast<const A*>(lse.const_data_ptr());
    A* to = static_cast<A*>(first.mutable_data_ptr());
    const int64_t heads = lse.size(1), batch_step = lse.stride(0), head_step = lse.stride(1),
                  step = lse.stride(2);
    for (int64_t i = 0; i < lse.size(0) * heads; ++i)
      for (int64_t n = 0; n < rows; ++n)
        *to++ = from[i / heads * batch_step + i % heads * head_step + n * step];
  };
  lse.scalar_type() == ScalarType::Double ? copy.template operator()<double>()
                                          : copy.template operator()<float>();
  return first;
}

// The kernel's mask, added to the logits: float, or double where that is the dtype of q. It broadcasts.
KeyBias mask_of(const KeyBias& bias, const Tensor& q) {
  if (!bias.has_value()) return {};
  Tensor mask = torch::stable::to(*bias, lse_dtype(q));
  mask = torch::stable::unsqueeze(mask, 1);
  return torch::stable::unsqueeze(mask, 1);
}
KeyBias sample(const KeyBias& bias, int64_t b) {
  return bias.has_value() ? KeyBias(sample(*bias, b)) : KeyBias();
}

Attended attend_keys(const Tensor& queries, const Tensor& k, const Tensor& v, const KeyBias& bias,
                     double softmax_scale) {
  const Tensor q = pad_rows(queries);
  const int64_t batch = q.size(0), heads = q.size(2), rows = queries.size(1);
  if (!samples_align(q) || !samples_align(k)) {
    const Attended all{new_empty(queries, queries.sizes()),
                       new_empty(queries, {batch, heads, rows}, lse_dtype(queries))};
    for (int64_t b = 0; b < batch; ++b) {
      const Attended one =
          attend_keys(sample(queries, b), sample(k, b), sample(v, b), sample(bias, b), softmax_scale);
      set_sample(all.out, b, one.out);
      set_sample(all.lse, b, one.lse);
    }
    return all;
  }
  std::vector<Tensor> result;
  run_units(batch * heads == 1 && q.size(1) == kMinQueries, [&] {
    result = call_aten("aten::_scaled_dot_product_flash_attention_for_cpu", "", 2, swapped(align(q)),
                       swapped(align(k)), swapped(align(v)),
                       /*dropout_p=*/0.0, /*is_causal=*/false, /*attn_mask=*/mask_of(bias, q),
                       std::optional<double>(softmax_scale));
  });
  return {swapped(result[0], rows), first_rows(result[1], rows)};
}

Gradients backward(const Tensor& grad_out, const Tensor& queries, const Tensor& k, const Tensor& v,
                   const KeyBias& bias, const Attended& whole, double softmax_scale) {
  const Tensor q = repeat_last_row(queries, 1);
  const int64_t batch = q.size(0), rows = queries.size(1);
  if (!samples_align(q) || !samples_align(k)) {
    const Gradients all{new_empty(queries, queries.sizes()), new_empty(k, k.sizes()),
                        new_empty(v, v.sizes())};
    for (int64_t b = 0; b < batch; ++b) {
      const Gradients one =
          backward(sample(grad_out, b), sample(queries, b), sample(k, b), sample(v, b), sample(bias, b),
                   {sample(whole.out, b), sample(whole.lse, b)}, softmax_scale);
      set_sample(all.q, b, one.q);
      set_sample(all.k, b, one.k);
      set_sample(all.v, b, one.v);
    }
    return all;
  }
  std::vector<Tensor> grad;
  run_units(batch * k.size(2) == 1, [&] {
    grad = call_aten("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "", 3,
                     swapped(align(pad_rows(grad_out))), swapped(align(q)), swapped(align(k)),
                     swapped(align(v)), swapped(pad_rows(whole.out)), repeat_last_row(whole.lse, 2),
                     /*dropout_p=*/0.0, /*is_causal=*/false, /*attn_mask=*/mask_of(bias, q),
                     std::optional<double>(softmax_scale));
  });
  return {swapped(grad[0], rows), swapped(grad[1]), swapped(grad[2])};
}

// Strided access to [B, n, H, D] (unit stride in D), or to [B, H, n] with `head` and `row` in that order.
template <typename T>
struct Rows {
  T* data;
  int64_t batch, row, head;
  T* at(int64_t b, int64_t n, int64_t h) const { return data + b * batch + n * row + h * head; }
};
template <typename T>
Rows<const T> read_rows(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}
template <typename T>
Rows<T> write_rows(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// Elements one task should touch at least: below, starting threads costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// f(b, n) for every row, spread over the threads. Rows are independent: the split cannot change a bit.
template <typename F>
void for_each_row(const Tensor& t, const F& f) {
  const int64_t rows = t.size(1), row_elements = t.size(2) * t.size(3);
  const int64_t grain = row_elements >= kGrainElements ? 1 : kGrainElements / row_elements;
  torch::stable::parallel_for(0, t.size(0) * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / rows, i % rows);
  });
}

// Whether every logit of a query is -inf, the kernel having said that their softmax is empty or has lse = 0:
// in the latter case the largest logit is in [-log(keys), 0].
template <typename T>
bool sees_nothing(const T* q, const Rows<const T>& k, const float* bias, int64_t b, int64_t head,
                  int64_t keys, int64_t dim, double softmax_scale) {
  using A = acc_t<T>;
  for (int64_t t = 0; t < keys; ++t) {
    const T* key = k.at(b, t, head);
    A logit = 0;
    for (int64_t d = 0; d < dim; ++d) logit += to_acc(q[d]) * to_acc(key[d]);
    if (logit * static_cast<A>(softmax_scale) + (bias == nullptr ? A(0) : A(bias[t])) > A(-1e6)) return false;
  }
  return true;
}

// The kernel gives a query whose logits are all -inf out = 0, which is right, and lse = 0: that becomes -inf.
template <typename T>
void mark_empty(const Tensor& queries, const Tensor& keys, const KeyBias& bias, double softmax_scale,
                const Attended& result) {
  using A = acc_t<T>;
  const int64_t heads = queries.size(2), dim = queries.size(3), group = heads / keys.size(2);
  const auto q = read_rows<T>(queries), k = read_rows<T>(keys), out = read_rows<T>(result.out);
  const auto lse = write_rows<A>(result.lse);
  const auto* of_keys = bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  for_each_row(queries, [&](int64_t b, int64_t n) {
    const float* own = of_keys == nullptr ? nullptr : of_keys + b * bias->stride(0);
    for (int64_t h = 0; h < heads; ++h) {
      if (*lse.at(b, h, n) != A(0)) continue;
      const T* y = out.at(b, n, h);
      bool zero = true;
      for (int64_t d = 0; d < dim && zero; ++d) zero = to_acc(y[d]) == A(0);
      if (zero && sees_nothing(q.at(b, n, h), k, own, b, h / group, keys.size(1), dim, softmax_scale))
        *lse.at(b, h, n) = -std::numeric_limits<A>::infinity();
    }
  });
}

Attended forward(const Tensor& q, const Tensor& k, const Tensor& v, const KeyBias& bias,
                 double softmax_scale) {
  const Attended result = attend_keys(q, k, v, bias, softmax_scale);
  with_dtype(checked_dtype(kOp, "q", q),
             [&]<typename T>() { mark_empty<T>(q, k, bias, softmax_scale, result); });
  return result;
}

template <typename T>
void merge_typed(const Attended& first, const Attended& second, const Attended& rows) {
  using A = acc_t<T>;
  const int64_t heads = rows.out.size(2), dim = rows.out.size(3);
  const auto out0 = read_rows<T>(first.out), out1 = read_rows<T>(second.out);
  const auto lse0 = read_rows<A>(first.lse), lse1 = read_rows<A>(second.lse);
  const auto out = write_rows<T>(rows.out);
  const auto lse = write_rows<A>(rows.lse);
  for_each_row(rows.out, [&](int64_t b, int64_t n) {
    for (int64_t h = 0; h < heads; ++h) {
      const LseMerge<A> merged = lse_merge(*lse0.at(b, h, n), *lse1.at(b, h, n));
      const T* x0 = out0.at(b, n, h);
      const T* x1 = out1.at(b, n, h);
      T* y = out.at(b, n, h);
      for (int64_t d = 0; d < dim; ++d)
        y[d] = from_acc<T>(merged.weight0 * to_acc(x0[d]) + merged.weight1 * to_acc(x1[d]));
      *lse.at(b, h, n) = merged.lse;
    }
  });
}

void merge(const Attended& first, const Attended& second, const Attended& rows) {
  with_dtype(checked_dtype(kOp, "q", rows.out), [&]<typename T>() { merge_typed<T>(first, second, rows); });
}

template <typename S, typename T>
void accumulate_typed(const Tensor& sum, const Tensor& term) {
  const int64_t heads = sum.size(2), dim = sum.size(3);
  const auto x = read_rows<T>(term);
  const auto y = write_rows<S>(sum);
  for_each_row(sum, [&](int64_t b, int64_t n) {
    for (int64_t h = 0; h < heads; ++h) {
      const T* from = x.at(b, n, h);
      S* to = y.at(b, n, h);
      for (int64_t d = 0; d < dim; ++d)
        to[d] = from_acc<S>(to_acc(to[d]) + static_cast<acc_t<S>>(to_acc(from[d])));
    }
  });
}

void accumulate(const Tensor& sum, const Tensor& term) {
  const bool same = sum.scalar_type() == term.scalar_type();
  with_dtype(checked_dtype(kOp, "q", term), [&]<typename T>() {
    same ? accumulate_typed<T, T>(sum, term) : accumulate_typed<float, T>(sum, term);  // half into float
  });
}

}  // namespace

const Backend cpu_backend{&forward, &backward, &merge, &accumulate};

}  // namespace rf::sink_window_attention
