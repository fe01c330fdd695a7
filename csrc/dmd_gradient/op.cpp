// dmd_gradient: checks, outputs, params, dispatch. Inputs that are not contiguous are copied once.
#include <cmath>
#include <optional>
#include <tuple>

#include "csrc/common/dispatch.h"
#include "csrc/dmd_gradient/config.h"
#include "csrc/dmd_gradient/launch.h"

namespace rf::dmd_gradient {

namespace {

constexpr const char* kOp = "dmd_gradient";
using OptionalTensor = std::optional<Tensor>;

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// A prediction, or x_t: like x, in the dtype of the predictions.
Tensor checked_prediction(const char* arg, const Tensor& t, const Tensor& x, ScalarType dtype) {
  check_same_device(kOp, arg, t, x);
  check_dtype(kOp, arg, t, dtype);
  RF_CHECK_ARG(same_shape(t, x), kOp, arg, concat("the shape of `x`, ", shape_text(x)), shape_text(t));
  return torch::stable::contiguous(t);
}

// `t` holds [B], [B, F], or (if `elements`) as many dimensions as x; a dimension of size 1 is broadcast.
Broadcast checked_broadcast(const char* arg, const Tensor& t, const Tensor& x, ScalarType dtype,
                            bool elements, int width) {
  check_same_device(kOp, arg, t, x);
  check_dtype(kOp, arg, t, dtype);
  const std::string expected =
      concat(elements ? "shape [B], [B, F] or one that broadcasts to `x` with as many dimensions, x being "
                      : "shape [B] or [B, F], x being ",
             shape_text(x));
  RF_CHECK_ARG(t.dim() >= 1 && t.dim() <= x.dim() && (t.dim() <= 2 || (elements && t.dim() == x.dim())), kOp,
               arg, expected, shape_text(t));
  for (int64_t d = 0; d < t.dim(); ++d)
    RF_CHECK_ARG(t.size(d) == 1 || t.size(d) == x.size(d), kOp, arg, expected, shape_text(t));

  Broadcast out;
  out.data = t.const_data_ptr();
  out.batch_stride = t.size(0) == 1 ? 0 : t.stride(0);
  for (int64_t d = 1; d < x.dim(); ++d) {
    if (x.size(d) == 1) continue;
    const int64_t stride = d < t.dim() && t.size(d) != 1 ? t.stride(d) : 0;
    if (out.dims > 0 && out.stride[out.dims - 1] == stride * x.size(d)) {
      out.size[out.dims - 1] *= x.size(d);
      out.stride[out.dims - 1] = stride;
      continue;
    }
    out.size[out.dims] = x.size(d);
    out.stride[out.dims++] = stride;
  }
  if (out.dims == 1 && out.stride[0] == 0) out.dims = 0;  // one value per sample

  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const int64_t align = width * bytes < 16 ? width * bytes : 16;
  out.vectorised = out.dims > 0 && out.stride[out.dims - 1] == 1 && out.size[out.dims - 1] % width == 0 &&
                   reinterpret_cast<uintptr_t>(out.data) % align == 0 &&
                   out.batch_stride * bytes % align == 0;
  for (int d = 0; d + 1 < out.dims; ++d)
    out.vectorised = out.vectorised && out.stride[d] * bytes % align == 0;
  return out;
}

// Memory that kernels use between their passes; every column begins at a multiple of 8 bytes.
Tensor make_workspace(const Tensor& x, Params& p, int64_t acc_bytes) {
  const int64_t tiles = p.batch * p.tiles > 0 ? p.batch * p.tiles : 1;
  const int64_t column = (tiles * acc_bytes + 7) / 8 * 8, samples = (p.batch * 4 + 7) / 8 * 8;
  Tensor workspace = torch::stable::new_empty(x, {16 * tiles + 3 * column + samples + 8}, ScalarType::Byte);
  char* at = static_cast<char*>(workspace.mutable_data_ptr());
  p.selected = reinterpret_cast<int64_t*>(at);
  p.distance_sum = reinterpret_cast<double*>(at += 8 * tiles);
  p.peak = at += 8 * tiles;
  p.loss_sum = at += column;
  p.norm_sum = at += column;
  p.drop = reinterpret_cast<int32_t*>(at += column);
  p.ticket = reinterpret_cast<uint32_t*>(at += samples);
  return workspace;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs dmd_gradient(const Tensor& x_in, const Tensor& fake_in, const Tensor& real_in,
                     const OptionalTensor& fake_uncond_in, const OptionalTensor& real_uncond_in,
                     double fake_guidance, double real_guidance, const OptionalTensor& x_t_in,
                     const OptionalTensor& sigma, const OptionalTensor& weight, const OptionalTensor& mask,
                     bool normalize, double eps, double floor, int64_t nan, int64_t reduction,
                     bool scale_gradient) {
  Params p;
  p.dtype = checked_dtype(kOp, "x", x_in);
  RF_CHECK_ARG(x_in.dim() >= 1 && x_in.dim() <= kMaxDims + 1, kOp, "x",
               concat("1 to ", kMaxDims + 1, " dimensions [B, ...]"), shape_text(x_in));
  p.prediction_dtype = checked_dtype(kOp, "fake", fake_in);
  RF_CHECK_ARG(p.prediction_dtype == p.dtype || p.prediction_dtype == Dtype::kFloat32, kOp, "fake",
               concat("the dtype of `x`, ", dtype_text(x_in.scalar_type()), ", or float32"),
               dtype_text(fake_in.scalar_type()));
  const ScalarType prediction = fake_in.scalar_type();
  const ScalarType acc = p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const int width = vector_width(dtype_bytes(p.dtype), dtype_bytes(p.prediction_dtype));

  const Tensor fake = checked_prediction("fake", fake_in, x_in, prediction);
  const Tensor real = checked_prediction("real", real_in, x_in, prediction);
  RF_CHECK_ARG(std::isfinite(fake_guidance), kOp, "fake_guidance", "a finite number", fake_guidance);
  RF_CHECK_ARG(std::isfinite(real_guidance), kOp, "real_guidance", "a finite number", real_guidance);
  OptionalTensor fake_uncond, real_uncond, x_t;
  if (fake_uncond_in)
    fake_uncond = checked_prediction("fake_uncond", *fake_uncond_in, x_in, prediction);
  else
    RF_CHECK_ARG(fake_guidance == 0, kOp, "fake_uncond", "an unconditional prediction to guide away from",
                 "None with guidance ", fake_guidance);
  if (real_uncond_in)
    real_uncond = checked_prediction("real_uncond", *real_uncond_in, x_in, prediction);
  else
    RF_CHECK_ARG(real_guidance == 0, kOp, "real_uncond", "an unconditional prediction to guide away from",
                 "None with guidance ", real_guidance);
  RF_CHECK_ARG(x_t_in.has_value() == sigma.has_value(), kOp, x_t_in ? "sigma" : "x_t",
               "both `x_t` and `sigma` (flow predictions), or neither (x0 predictions)", "None");
  if (x_t_in) {
    x_t = checked_prediction("x_t", *x_t_in, x_in, prediction);
    p.sigma = checked_broadcast("sigma", *sigma, x_in, acc, false, width);
  }
  if (weight) p.weight = checked_broadcast("weight", *weight, x_in, acc, true, width);
  if (mask) p.mask = checked_broadcast("mask", *mask, x_in, ScalarType::Bool, true, width);
  RF_CHECK_ARG(std::isfinite(eps) && eps >= 0, kOp, "eps", "a finite number >= 0", eps);
  RF_CHECK_ARG(std::isfinite(floor) && floor >= 0, kOp, "floor", "a finite number >= 0", floor);
  RF_CHECK_ARG(nan >= 0 && nan <= 2, kOp, "nan", "0 (published), 1 (sample) or 2 (raise)", nan);
  RF_CHECK_ARG(reduction >= 0 && reduction <= 2, kOp, "reduction", "0 (mean), 1 (sum) or 2 (none)",
               reduction);

  const Tensor x = torch::stable::contiguous(x_in);
  p.batch = x.size(0);
  p.sample_size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) p.sample_size *= x.size(d);
  p.tiles = (p.sample_size + kTile - 1) / kTile;
  p.x = x.const_data_ptr();
  p.fake = fake.const_data_ptr();
  p.real = real.const_data_ptr();
  if (fake_uncond && fake_guidance != 0) p.fake_uncond = fake_uncond->const_data_ptr();
  if (real_uncond && real_guidance != 0) p.real_uncond = real_uncond->const_data_ptr();
  if (x_t) p.x_t = x_t->const_data_ptr();
  p.fake_guidance = fake_guidance;
  p.real_guidance = real_guidance;
  p.eps = eps;
  p.floor = floor;
  p.normalize = normalize;
  p.mean = static_cast<Reduction>(reduction) == Reduction::kMean;
  p.scale_gradient = scale_gradient;
  p.nan_rule = static_cast<NanRule>(nan);

  const int64_t shape_b[] = {p.batch};
  Tensor gradient = torch::stable::new_empty(x, x.sizes());
  Tensor loss = torch::stable::new_empty(x, {}, acc);
  Tensor sample_loss = torch::stable::new_empty(x, shape_b, acc);
  Tensor gradient_norm = torch::stable::new_empty(x, shape_b, acc);
  Tensor normalizer = torch::stable::new_empty(x, shape_b, acc);
  Tensor dropped = torch::stable::new_empty(x, {}, ScalarType::Long);
  Tensor scale = torch::stable::new_empty(x, {}, acc);
  p.gradient = gradient.mutable_data_ptr();
  p.loss = loss.mutable_data_ptr();
  p.sample_loss = sample_loss.mutable_data_ptr();
  p.gradient_norm = gradient_norm.mutable_data_ptr();
  p.normalizer = normalizer.mutable_data_ptr();
  p.dropped = static_cast<int64_t*>(dropped.mutable_data_ptr());
  p.scale = scale.mutable_data_ptr();
  Tensor workspace = make_workspace(x, p, acc == ScalarType::Double ? 8 : 4);

  p.vectorised = p.sample_size % width == 0;
  for (const void* pointer :
       {p.x, p.fake, p.real, p.fake_uncond, p.real_uncond, p.x_t, static_cast<const void*>(p.gradient)})
    p.vectorised = p.vectorised && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;

  if (is_meta(x)) return {gradient, loss, sample_loss, gradient_norm, normalizer, dropped, scale};
  run_where_tensors_are(
      kOp, x, [&] { return run_cpu(p); },
      [&](void* stream) {
        check_cuda(kOp, run_cuda(p, stream));
        return "CUDA tensors";
      },
      [&] {
        call_triton(kOp, x, fake, real, fake_uncond, real_uncond, fake_guidance, real_guidance, x_t, sigma,
                    weight, mask, normalize, eps, floor, nan, reduction, scale_gradient, gradient, loss,
                    sample_loss, gradient_norm, normalizer, dropped, scale);
      });
  if (p.nan_rule == NanRule::kRaise) {  // the only mode that waits for the device
    const Tensor host = x.is_cpu()
                            ? dropped
                            : torch::stable::to(dropped, std::nullopt, std::nullopt,
                                                torch::stable::Device(torch::headeronly::DeviceType::CPU));
    const int64_t count = *static_cast<const int64_t*>(host.const_data_ptr());
    RF_CHECK_ARG(count == 0, kOp, "fake, real", "finite predictions (nan=\"raise\")", count, " of ", p.batch,
                 " samples with a gradient that is not finite");
  }
  return {gradient, loss, sample_loss, gradient_norm, normalizer, dropped, scale};
}

}  // namespace
}  // namespace rf::dmd_gradient

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CPU, m) {
  m.impl("dmd_gradient", TORCH_BOX(&rf::dmd_gradient::dmd_gradient));
}
STABLE_TORCH_LIBRARY_IMPL(rf_kernels, Meta, m) {
  m.impl("traced_dmd_gradient", TORCH_BOX(&rf::dmd_gradient::dmd_gradient));
}
STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CUDA, m) {
  m.impl("dmd_gradient", TORCH_BOX(&rf::dmd_gradient::dmd_gradient));
}
