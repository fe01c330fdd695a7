// CPU: PyTorch's flash attention for the CPU per interval of keys; merge and sums are ours.
#include "csrc/common/aten.h"
#include "csrc/common/dispatch.h"
#include "csrc/math/lse_merge.h"
#include "csrc/sink_window_attention/portable.h"

namespace rf::attention {
namespace {

using torch::stable::transpose;

// Its kernels take [B, H, S, D] by strides: a transposed view, no copy.
Attended forward(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale) {
  const auto result =
      call_aten("aten::_scaled_dot_product_flash_attention_for_cpu", "", "TT", transpose(q, 1, 2),
                transpose(k, 1, 2), transpose(v, 1, 2), /*dropout_p=*/0.0, /*is_causal=*/false,
                /*attn_mask=*/std::optional<Tensor>(), std::optional<double>(softmax_scale));
  return {transpose(result[0], 1, 2), result[1]};
}

Gradients backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Attended& whole, double softmax_scale) {
  const auto grad = call_aten("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "", "TTT",
                              transpose(grad_out, 1, 2), transpose(q, 1, 2), transpose(k, 1, 2),
                              transpose(v, 1, 2), transpose(whole.out, 1, 2), whole.lse,
                              /*dropout_p=*/0.0, /*is_causal=*/false,
                              /*attn_mask=*/std::optional<Tensor>(), std::optional<double>(softmax_scale));
  return {transpose(grad[0], 1, 2), transpose(grad[1], 1, 2), transpose(grad[2], 1, 2)};
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
  RF_DISPATCH_FLOATING(rows.out.scalar_type(), T, kOp, "q", merge_typed<T>(first, second, rows));
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
  RF_DISPATCH_FLOATING(term.scalar_type(), T, kOp, "q",
                       same ? accumulate_typed<T, T>(sum, term)
                            : accumulate_typed<float, T>(sum, term));  // half precision into float
}

}  // namespace

const Backend cpu_backend{&forward, &backward, &merge, &accumulate};

}  // namespace rf::attention
