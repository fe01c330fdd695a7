// sink_window_attention: the checks of a call, the choice of a backend, the registration.
#include <cmath>
#include <optional>
#include <tuple>

#include "csrc/common/dispatch.h"
#include "csrc/sink_window_attention/portable.h"
#include "csrc/sink_window_attention/sm90/op.h"

namespace rf::sink_window_attention {
namespace {

constexpr const char* kQueryLayout = "[B, Nq, Hq, D]";
constexpr const char* kKeyLayout = "[B, T, Hkv, D]";
constexpr const char* kOutLayout = "[B, Nq, Hq, Dv]";
constexpr int64_t kMaxHeadDim = 256;

// Matrix kernels step from token to token by a leading dimension of at least one row.
void check_rows(const char* arg, const Tensor& t) {
  check_last_dim_contiguous(kOp, arg, t);
  RF_CHECK_ARG(t.size(1) <= 1 || t.numel() == 0 || t.stride(1) >= t.size(3), kOp, arg,
               "tokens that do not overlap (stride of dimension 1 at least D)", strides_text(t));
}

void check_tensors(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dim(kOp, "q", q, 4, kQueryLayout);
  checked_dtype(kOp, "q", q);
  const int64_t batch = q.size(0), heads = q.size(2), dim = q.size(3);
  RF_CHECK_ARG(dim >= 1 && dim <= kMaxHeadDim, kOp, "q", concat("a head dim D of 1 to ", kMaxHeadDim),
               shape_text(q));
  check_dim(kOp, "k", k, 4, kKeyLayout);
  check_dtype(kOp, "k", k, q.scalar_type());
  check_same_device(kOp, "k", k, q);
  check_size(kOp, "k", k, 0, batch, kKeyLayout);
  check_size(kOp, "k", k, 3, dim, kKeyLayout);
  const int64_t kv_heads = k.size(2);
  RF_CHECK_ARG(kv_heads == heads || (kv_heads > 0 && heads % kv_heads == 0), kOp, "k",
               concat("a number of heads Hkv that divides Hq = ", heads), shape_text(k));
  check_dim(kOp, "v", v, 4, kKeyLayout);
  check_dtype(kOp, "v", v, q.scalar_type());
  check_same_device(kOp, "v", v, q);
  for (int64_t i = 0; i < 3; ++i) check_size(kOp, "v", v, i, k.size(i), "k");
  RF_CHECK_ARG(v.size(3) >= 1 && v.size(3) <= dim, kOp, "v",
               concat("a head dim Dv of 1 to that of k, D = ", dim), shape_text(v));
  check_rows("q", q);
  check_rows("k", k);
  check_rows("v", v);
}

// Every query sees the first kv_tokens keys.
std::vector<QueryChunk> dense_prefix(const Tensor& q, const Tensor& k, std::optional<int64_t> kv_tokens,
                                     const std::optional<Tensor>& row_kv_tokens, int64_t num_sink_tokens,
                                     std::optional<int64_t> num_window_tokens) {
  RF_CHECK_ARG(num_sink_tokens == 0, kOp, "num_sink_tokens", "0 without `chunk_ends`", num_sink_tokens);
  RF_CHECK_ARG(!num_window_tokens.has_value(), kOp, "num_window_tokens", "None without `chunk_ends`",
               *num_window_tokens);
  RF_CHECK_ARG(kv_tokens.has_value() != row_kv_tokens.has_value(), kOp, "kv_tokens",
               "the number of valid tokens at the start of k and v, or `chunk_ends`",
               kv_tokens.has_value() ? "two of them" : "None");
  const int64_t tokens = k.size(1), valid = kv_tokens.value_or(tokens);
  RF_CHECK_ARG(valid >= 0 && valid <= tokens, kOp, "kv_tokens",
               concat("0 to T = ", tokens, ", the tokens of k"), valid);
  KeyIntervals keys;
  push_interval(keys, 0, valid);
  return {{0, q.size(1), keys}};
}

// Rows of their own: a length for each. Their values are seen on the CPU alone; elsewhere the host would wait
// for the device, and the kernels clamp them.
std::optional<Tensor> checked_rows(const Tensor& q, const Tensor& k, const std::optional<Tensor>& rows) {
  if (!rows.has_value()) return {};
  constexpr const char* kLayout = "int32 [B], a number of valid tokens for each row";
  check_dim(kOp, "kv_tokens", *rows, 1, kLayout);
  check_dtype(kOp, "kv_tokens", *rows, ScalarType::Int);
  check_same_device(kOp, "kv_tokens", *rows, q);
  check_size(kOp, "kv_tokens", *rows, 0, q.size(0), kLayout);
  const Tensor dense = torch::stable::contiguous(*rows);
  if (dense.is_cpu()) {
    const int64_t tokens = k.size(1);
    const auto* valid = static_cast<const int32_t*>(dense.const_data_ptr());
    for (int64_t b = 0; b < dense.size(0); ++b)
      RF_CHECK_ARG(valid[b] >= 0 && valid[b] <= tokens, kOp, "kv_tokens",
                   concat("0 to T = ", tokens, ", the tokens of k"), valid[b], " in row ", b);
  }
  return dense;
}

// As [B, T].
std::optional<Tensor> checked_bias(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bias,
                                   bool whole_sequence) {
  if (!bias.has_value()) return {};
  RF_CHECK_ARG(!whole_sequence, kOp, "kv_bias", "None with `chunk_ends`", "a tensor");
  RF_CHECK_ARG(bias->dim() == 1 || bias->dim() == 2, kOp, "kv_bias", "1 or 2 dimensions, [T] or [B, T]",
               shape_text(*bias));
  check_dtype(kOp, "kv_bias", *bias, ScalarType::Float);
  check_same_device(kOp, "kv_bias", *bias, q);
  const int64_t last = bias->dim() - 1, batch = q.size(0), tokens = k.size(1);
  check_size(kOp, "kv_bias", *bias, last, tokens, "[T] or [B, T]");
  if (last == 1) check_size(kOp, "kv_bias", *bias, 0, batch, "[B, T]");
  const Tensor dense = bias->stride(last) == 1 ? *bias : torch::stable::contiguous(*bias);
  if (last == 1) return dense;
  const int64_t size[] = {batch, tokens};
  return call_aten("aten::expand", "", 1, dense, torch::headeronly::HeaderOnlyArrayRef<int64_t>(size, 2),
                   /*implicit=*/false)[0];
}

// Every chunk of queries sees the sink and its own window.
std::vector<QueryChunk> whole_sequence(const Tensor& q, const Tensor& k, std::optional<int64_t> kv_tokens,
                                       const std::optional<Tensor>& row_kv_tokens,
                                       const std::vector<int64_t>& chunk_ends, int64_t num_sink_tokens,
                                       std::optional<int64_t> num_window_tokens) {
  const int64_t tokens = q.size(1);
  check_size(kOp, "k", k, 1, tokens, "k with `chunk_ends` (a key per query)");
  RF_CHECK_ARG(!kv_tokens.has_value(), kOp, "kv_tokens", "None with `chunk_ends`", *kv_tokens);
  RF_CHECK_ARG(!row_kv_tokens.has_value(), kOp, "kv_tokens", "None with `chunk_ends`", "a tensor");
  RF_CHECK_ARG(num_sink_tokens >= 0, kOp, "num_sink_tokens", "at least 0", num_sink_tokens);
  const int64_t window = num_window_tokens.value_or(tokens);
  RF_CHECK_ARG(window >= 0, kOp, "num_window_tokens", "at least 0", window);
  std::vector<QueryChunk> chunks;
  chunks.reserve(chunk_ends.size());
  int64_t begin = 0;
  for (const int64_t end : chunk_ends) {
    RF_CHECK_ARG(end > begin && end <= tokens, kOp, "chunk_ends",
                 concat("ascending token counts up to Nq = ", tokens), end, " after ", begin);
    chunks.push_back({begin, end, key_intervals(end, num_sink_tokens, window)});
    begin = end;
  }
  RF_CHECK_ARG(begin == tokens, kOp, "chunk_ends", concat("a last entry of Nq = ", tokens), begin);
  return chunks;
}

Problem check(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<int64_t> kv_tokens,
              const std::optional<Tensor>& row_kv_tokens, const std::optional<Tensor>& kv_bias,
              double softmax_scale, const std::optional<std::vector<int64_t>>& chunk_ends,
              int64_t num_sink_tokens, std::optional<int64_t> num_window_tokens) {
  check_tensors(q, k, v);
  RF_CHECK_ARG(std::isfinite(softmax_scale) && softmax_scale > 0, kOp, "softmax_scale",
               "a finite number above 0", softmax_scale);
  ValueColumns values;
  const Tensor wide = wide_values(k, v, values);
  return {
      q,
      k,
      wide,
      softmax_scale,
      chunk_ends.has_value()
          ? whole_sequence(q, k, kv_tokens, row_kv_tokens, *chunk_ends, num_sink_tokens, num_window_tokens)
          : dense_prefix(q, k, kv_tokens, row_kv_tokens, num_sink_tokens, num_window_tokens),
      checked_rows(q, k, row_kv_tokens),
      checked_bias(q, k, kv_bias, chunk_ends.has_value()),
      values};
}

const Backend& choose_cpu(const Problem& problem) {
  record_dispatch(kOp, "cpu", "");
  return cpu_backend;
}

// PyTorch's kernels, for what no kernel of this library takes.
const Backend& choose_cuda(const Problem& problem, const char* reason) {
  const ScalarType dtype = problem.q.scalar_type();
  RF_CHECK_ARG(dtype != ScalarType::Double, kOp, "q",
               "dtype float32, bfloat16 or float16 on CUDA (no CUDA attention kernel computes in float64)",
               dtype_text(dtype));
  if (dtype == ScalarType::Float || problem.row_kv_tokens.has_value() || problem.kv_bias.has_value()) {
    record_fallback(kOp, "torch_efficient", reason);
    return cuda_efficient_backend;
  }
  record_fallback(kOp, "torch_flash", reason);
  return cuda_flash_backend;
}

const Backend& choose_cuda_backward(const Problem& problem) {
  return choose_cuda(problem, "the backward has no kernel of this library");
}

// Triton comes after PyTorch's kernels, where those do not run: on ROCm, and on GPUs before compute
// capability 8.0.
const char* torch_problem(const Tensor& q) {
  if (!q.is_cuda()) return nullptr;
  if (on_rocm()) return "ROCm";
#if defined(RF_WITH_CUDA)
  const int major = cuda_capability_major(q.get_device_index());
  if (major > 0 && major < 8) return "PyTorch's flash kernels need compute capability 8.0";
#endif
  return nullptr;
}

std::optional<Attended> forward_triton(const Problem& p, std::optional<int64_t> kv_tokens,
                                       const std::optional<std::vector<int64_t>>& chunk_ends,
                                       int64_t num_sink_tokens, std::optional<int64_t> num_window_tokens,
                                       const char* problem) {
  if (!triton_serves(kOp, p.q, problem)) return std::nullopt;
  const Attended whole{
      torch::stable::new_empty(p.q, p.q.sizes()),
      torch::stable::new_empty(p.q, {p.q.size(0), p.q.size(2), p.q.size(1)}, lse_dtype(p.q))};
  call_triton(kOp, p.q, p.k, p.v, kv_tokens, p.softmax_scale, chunk_ends, num_sink_tokens, num_window_tokens,
              p.row_kv_tokens, p.kv_bias, whole.out, whole.lse);
  return whole;
}

// Always deterministic: the flag changes nothing here.
std::tuple<Tensor, Tensor> forward_cpu(Tensor q, Tensor k, Tensor v, std::optional<int64_t> kv_tokens,
                                       double softmax_scale, std::optional<std::vector<int64_t>> chunk_ends,
                                       int64_t num_sink_tokens, std::optional<int64_t> num_window_tokens,
                                       bool deterministic, std::optional<Tensor> row_kv_tokens,
                                       std::optional<Tensor> kv_bias) {
  const Problem problem = check(q, k, v, kv_tokens, row_kv_tokens, kv_bias, softmax_scale, chunk_ends,
                                num_sink_tokens, num_window_tokens);
  if (const auto result =
          forward_triton(problem, kv_tokens, chunk_ends, num_sink_tokens, num_window_tokens, nullptr))
    return {problem.values.of(result->out), result->lse};
  const Attended result = attend(problem, choose_cpu(problem));
  return {problem.values.of(result.out), result.lse};
}

// The one place where a CUDA kernel is chosen: a kernel of this library goes first, PyTorch's are the
// fallback.
std::tuple<Tensor, Tensor> forward_cuda(Tensor q, Tensor k, Tensor v, std::optional<int64_t> kv_tokens,
                                        double softmax_scale, std::optional<std::vector<int64_t>> chunk_ends,
                                        int64_t num_sink_tokens, std::optional<int64_t> num_window_tokens,
                                        bool deterministic, std::optional<Tensor> row_kv_tokens,
                                        std::optional<Tensor> kv_bias) {
  const Problem problem = check(q, k, v, kv_tokens, row_kv_tokens, kv_bias, softmax_scale, chunk_ends,
                                num_sink_tokens, num_window_tokens);
  if (const auto result = forward_triton(problem, kv_tokens, chunk_ends, num_sink_tokens, num_window_tokens,
                                         torch_problem(q)))
    return {problem.values.of(result->out), result->lse};
  const char* reason = kNoHopperPart;
#if defined(RF_WITH_HOPPER)
  const Sm90Options options{num_sink_tokens, num_window_tokens, chunk_ends.has_value(), deterministic};
  reason = refused_by_sm90(problem, options);
  if (reason == nullptr) {
    record_dispatch(kOp, "hopper", "");
    const Attended result = forward_sm90(problem, options);
    return {problem.values.of(result.out), result.lse};
  }
#endif
  const Attended result = attend(problem, choose_cuda(problem, reason));
  return {problem.values.of(result.out), result.lse};
}

// While a compiler traces: the checks.
std::tuple<Tensor, Tensor> forward_traced(Tensor q, Tensor k, Tensor v, std::optional<int64_t> kv_tokens,
                                          double softmax_scale,
                                          std::optional<std::vector<int64_t>> chunk_ends,
                                          int64_t num_sink_tokens, std::optional<int64_t> num_window_tokens,
                                          bool deterministic, std::optional<Tensor> row_kv_tokens,
                                          std::optional<Tensor> kv_bias) {
  check(q, k, v, kv_tokens, row_kv_tokens, kv_bias, softmax_scale, chunk_ends, num_sink_tokens,
        num_window_tokens);
  return {q, q};
}

template <const Backend& (*choose)(const Problem&)>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,
                                            Tensor lse, std::optional<int64_t> kv_tokens,
                                            double softmax_scale,
                                            std::optional<std::vector<int64_t>> chunk_ends,
                                            int64_t num_sink_tokens, std::optional<int64_t> num_window_tokens,
                                            std::optional<Tensor> row_kv_tokens,
                                            std::optional<Tensor> kv_bias) {
  const Problem problem = check(q, k, v, kv_tokens, row_kv_tokens, kv_bias, softmax_scale, chunk_ends,
                                num_sink_tokens, num_window_tokens);
  for (const auto& [name, t] : {std::pair{"grad_out", &grad_out}, std::pair{"out", &out}}) {
    check_dim(kOp, name, *t, 4, kOutLayout);
    for (int64_t i = 0; i < 3; ++i) check_size(kOp, name, *t, i, q.size(i), kOutLayout);
    check_size(kOp, name, *t, 3, v.size(3), kOutLayout);
    check_dtype(kOp, name, *t, q.scalar_type());
    check_same_device(kOp, name, *t, q);
  }
  check_dim(kOp, "lse", lse, 3, "[B, Hq, Nq]");
  check_size(kOp, "lse", lse, 0, q.size(0), "[B, Hq, Nq]");
  check_size(kOp, "lse", lse, 1, q.size(2), "[B, Hq, Nq]");
  check_size(kOp, "lse", lse, 2, q.size(1), "[B, Hq, Nq]");
  check_dtype(kOp, "lse", lse, lse_dtype(q));
  check_same_device(kOp, "lse", lse, q);
  const ValueColumns& values = problem.values;
  const Tensor wide_grad = values.widened(grad_out, q.size(3));
  const Attended whole{torch::stable::contiguous(values.widened(out, q.size(3))), lse};
  if (triton_serves(kOp, q, torch_problem(q))) {
    // Zeros where no query sees a key.
    const Gradients grad{torch::stable::new_zeros(q, q.sizes()), torch::stable::new_zeros(k, k.sizes()),
                         torch::stable::new_zeros(k, k.sizes())};
    call_triton("sink_window_attention_backward", wide_grad, q, k, problem.v, whole.out, lse, kv_tokens,
                softmax_scale, chunk_ends, num_sink_tokens, num_window_tokens, problem.row_kv_tokens,
                problem.kv_bias, grad.q, grad.k, grad.v);
    return {grad.q, grad.k, values.of(grad.v)};
  }
  const Gradients grad = attend_backward(wide_grad, problem, whole, choose(problem));
  return {grad.q, grad.k, values.of(grad.v)};
}

}  // namespace
}  // namespace rf::sink_window_attention

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CPU, m) {
  m.impl("sink_window_attention", TORCH_BOX(&rf::sink_window_attention::forward_cpu));
  m.impl("sink_window_attention_backward",
         TORCH_BOX(&rf::sink_window_attention::backward<&rf::sink_window_attention::choose_cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, Meta, m) {
  m.impl("traced_sink_window_attention", TORCH_BOX(&rf::sink_window_attention::forward_traced));
}

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CUDA, m) {
  m.impl("sink_window_attention", TORCH_BOX(&rf::sink_window_attention::forward_cuda));
  m.impl("sink_window_attention_backward",
         TORCH_BOX(&rf::sink_window_attention::backward<&rf::sink_window_attention::choose_cuda_backward>));
}
