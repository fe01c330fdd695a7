// CUDA on PyTorch's own kernels: flash for half precision, memory-efficient for float. Host code only.
#include <limits>

#include "csrc/common/aten.h"
#include "csrc/sink_window_attention/portable.h"

namespace rf::sink_window_attention {
namespace {

using torch::headeronly::HeaderOnlyArrayRef;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::reshape;
using torch::stable::subtract;
using torch::stable::transpose;
using torch::stable::unsqueeze;

Tensor call_unary(const char* op, const Tensor& x) {
  return call_aten(op, "", 1, x)[0];
}

// Zeros behind the last element of dimension `dim`, up to a multiple. Zero columns of q, k and v change
// neither a logit nor the columns that are kept.
Tensor pad_to_multiple(const Tensor& t, int64_t dim, int64_t multiple) {
  const int64_t missing = (multiple - t.size(dim) % multiple) % multiple;
  if (missing == 0) return t;
  std::vector<int64_t> padding(2 * static_cast<size_t>(t.dim() - dim), 0);
  padding.back() = missing;  // pairs (before, after), last dimension first
  return torch::stable::pad(t, padding);
}

// D padded to the 16 bytes that the kernels' loads need; and that as [B, H, S, D].
Tensor pad_head(const Tensor& t) {
  return pad_to_multiple(t, 3, 16 / static_cast<int64_t>(t.element_size()));
}
Tensor kernel_view(const Tensor& t) {
  return transpose(pad_head(t), 1, 2);
}
// And back to [B, S, H, dim].
Tensor library_view(const Tensor& t, int64_t dim) {
  return slice(transpose(t, 1, 2), 3, 0, dim);
}

// ---- A query whose logits are all -inf: each kernel has its own way to say so.

Tensor where(const Tensor& mask, const Tensor& yes, const Tensor& no) {
  return call_aten("aten::where", "self", 1, mask, yes, no)[0];
}

// Flash: out = 0 and lse = +inf, which it also gives for a NaN; there out is NaN in every column.
Tensor flash_lse(const Tensor& out, const Tensor& lse) {
  Tensor column = slice(out, 3, 0, 1);
  const Tensor first =
      torch::stable::to(torch::stable::squeeze(transpose(column, 1, 2), 3), ScalarType::Float);
  return where(call_unary("aten::isposinf", lse), subtract(first, lse), lse);
}

// Efficient: an infinite lse, and out = 0 * (1 / 0) in some versions of PyTorch.
Attended efficient_result(const Tensor& out, const Tensor& lse) {
  const Tensor empty = call_unary("aten::isinf", lse);
  Tensor none = new_empty(lse, {1});
  torch::stable::fill_(none, -std::numeric_limits<double>::infinity());
  return {where(unsqueeze(transpose(empty, 1, 2), 3), torch::stable::new_zeros(out, {1}), out),
          where(empty, none, lse)};
}

Attended forward_flash(const Tensor& q, const Tensor& k, const Tensor& v, const KeyBias& bias,
                       double softmax_scale) {
  // -> output, softmax_logsumexp, rng_state, unused, debug_attn_mask.
  // (aten::_scaled_dot_product_flash_attention returns numbers among its tensors, and torch_call_dispatcher
  // mixes up the types of such results.)
  const auto result = call_aten("aten::_flash_attention_forward", "", 5, pad_head(q), pad_head(k),
                                pad_head(v), /*cum_seq_q=*/std::optional<Tensor>(),
                                /*cum_seq_k=*/std::optional<Tensor>(), /*max_q=*/q.size(1),
                                /*max_k=*/k.size(1), /*dropout_p=*/0.0, /*is_causal=*/false,
                                /*return_debug_mask=*/false, std::optional<double>(softmax_scale));
  return {slice(result[0], 3, 0, q.size(3)), flash_lse(result[0], result[1])};
}

Gradients backward_flash(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                         const KeyBias& bias, const Attended& whole, double softmax_scale) {
  const Tensor no_dropout = new_empty(q, {0}, ScalarType::Long);
  const Tensor undefined;  // no cumulative lengths: equal lengths in the batch
  const auto grad =
      call_aten("aten::_scaled_dot_product_flash_attention_backward", "", 3, kernel_view(grad_out),
                kernel_view(q), kernel_view(k), kernel_view(v), kernel_view(whole.out), whole.lse, undefined,
                undefined, /*max_q=*/q.size(1), /*max_k=*/k.size(1), /*dropout_p=*/0.0,
                /*is_causal=*/false, no_dropout, no_dropout, std::optional<double>(softmax_scale));
  const int64_t dim = q.size(3);
  return {library_view(grad[0], dim), library_view(grad[1], dim), library_view(grad[2], dim)};
}

// The memory-efficient kernels have no grouped-query heads: each key head is repeated for its queries (a
// copy).
Tensor repeat_heads(const Tensor& kv, int64_t heads) {
  const int64_t batch = kv.size(0), tokens = kv.size(1), kv_heads = kv.size(2), dim = kv.size(3);
  if (kv_heads == heads) return kv;
  const int64_t size[] = {batch, tokens, kv_heads, heads / kv_heads, dim};
  const Tensor repeated = call_aten("aten::expand", "", 1, unsqueeze(kv, 3),
                                    HeaderOnlyArrayRef<int64_t>(size, 5), /*implicit=*/false)[0];
  return reshape(repeated, {batch, tokens, heads, dim});
}
// The gradient of that copy: the sum over the queries' heads of a group.
Tensor sum_heads(const Tensor& grad, int64_t kv_heads) {
  const int64_t batch = grad.size(0), tokens = grad.size(1), heads = grad.size(2), dim = grad.size(3);
  if (kv_heads == heads) return grad;
  const int64_t group_dim[] = {3};
  return torch::stable::sum(reshape(grad, {batch, tokens, kv_heads, heads / kv_heads, dim}),
                            HeaderOnlyArrayRef<int64_t>(group_dim, 1));
}

// A bias of keys as the [B, H, Nq, T] that the kernels take: in the dtype of q, one row for all heads and
// queries, its memory a multiple of 16 elements long.
KeyBias bias_view(const KeyBias& bias, const Tensor& q) {
  if (!bias.has_value()) return {};
  constexpr int64_t kBiasElements = 16;
  const Tensor padded = pad_to_multiple(torch::stable::to(*bias, q.scalar_type()), 1, kBiasElements);
  const Tensor keys = unsqueeze(unsqueeze(slice(padded, 1, 0, bias->size(1)), 1), 1);
  const int64_t size[] = {q.size(0), q.size(2), q.size(1), bias->size(1)};
  return call_aten("aten::expand", "", 1, keys, HeaderOnlyArrayRef<int64_t>(size, 4), /*implicit=*/false)[0];
}

Attended forward_efficient(const Tensor& q, const Tensor& k, const Tensor& v, const KeyBias& bias,
                           double softmax_scale) {
  const int64_t heads = q.size(2);
  // -> output, log_sumexp, philox_seed, philox_offset
  const auto result = call_aten("aten::_scaled_dot_product_efficient_attention", "", 4, kernel_view(q),
                                kernel_view(repeat_heads(k, heads)), kernel_view(repeat_heads(v, heads)),
                                /*attn_bias=*/bias_view(bias, q), /*compute_log_sumexp=*/true,
                                /*dropout_p=*/0.0, /*is_causal=*/false, std::optional<double>(softmax_scale));
  const Tensor lse = slice(result[1], 2, 0, q.size(1));  // it has padded rows
  return efficient_result(library_view(result[0], q.size(3)), lse);
}

Gradients backward_efficient(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                             const KeyBias& bias, const Attended& whole, double softmax_scale) {
  constexpr int64_t kLseRows = 32;  // rows of the LSE come in blocks of 32 (kAlignLSE of the kernel)
  const int64_t heads = q.size(2), kv_heads = k.size(2), dim = q.size(3);
  const Tensor no_dropout = new_empty(q, {}, ScalarType::Long);
  const Tensor undefined;
  const bool wanted[] = {true, true, true, false};  // q, k, v, bias
  const auto grad =
      call_aten("aten::_scaled_dot_product_efficient_attention_backward", "", 4, kernel_view(grad_out),
                kernel_view(q), kernel_view(repeat_heads(k, heads)), kernel_view(repeat_heads(v, heads)),
                /*attn_bias=*/bias_view(bias, q).value_or(undefined), kernel_view(whole.out),
                pad_to_multiple(whole.lse, 2, kLseRows), no_dropout, no_dropout, /*dropout_p=*/0.0,
                HeaderOnlyArrayRef<bool>(wanted, 4),
                /*is_causal=*/false, std::optional<double>(softmax_scale));
  return {library_view(grad[0], dim), sum_heads(library_view(grad[1], dim), kv_heads),
          sum_heads(library_view(grad[2], dim), kv_heads)};
}

// csrc/math/lse_merge.h in tensor ops; the LSE is float, so half-precision outputs are weighed in float and
// rounded once, by the copy.
void merge(const Attended& first, const Attended& second, const Attended& rows) {
  const Tensor lse = call_aten("aten::logaddexp", "", 1, first.lse, second.lse)[0];
  // Where both are empty, exp(-inf - 0) is the weight 0.
  const Tensor reference = replace_infinities(lse, std::numeric_limits<double>::infinity(), 0.0);
  const auto weighted = [&reference](const Attended& part) {
    const Tensor weight =
        unsqueeze(transpose(call_unary("aten::exp", subtract(part.lse, reference)), 1, 2), 3);
    return call_aten("aten::mul", "Tensor", 1, part.out, weight)[0];
  };
  Tensor out_rows = rows.out, lse_rows = rows.lse;
  torch::stable::copy_(out_rows, subtract(weighted(first), weighted(second), -1.0));
  torch::stable::copy_(lse_rows, lse);
}

void accumulate(const Tensor& sum, const Tensor& term) {
  Tensor target = sum;
  torch::stable::copy_(target, subtract(sum, term, -1.0));  // sum + term: the stable ABI has no add
}

}  // namespace

const Backend cuda_flash_backend{&forward_flash, &backward_flash, &merge, &accumulate};
const Backend cuda_efficient_backend{&forward_efficient, &backward_efficient, &merge, &accumulate};

}  // namespace rf::sink_window_attention
