// rope_append and rope: every check of the arguments, the outputs, and the choice of the backend.
#include <cmath>
#include <optional>
#include <unordered_map>
#include <vector>

#include "csrc/common/dispatch.h"
#include "csrc/rope_append/launch.h"

namespace rf::rope_append {
namespace {

constexpr const char* kRopeAppend = "rope_append";
constexpr const char* kRope = "rope";

HeadRows rows_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}
MutableHeadRows mutable_rows_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// ---- checks: nothing below writes to an argument ----

void check_data(const char* op, const char* arg, const Tensor& t, const char* layout) {
  check_dim(op, arg, t, 4, layout);
  check_last_dim_contiguous(op, arg, t);
  RF_CHECK_ARG(t.size(1) <= INT32_MAX && product_fits_int32(t.size(2), t.size(3)), op, arg,
               concat("fewer than 2^31 tokens and dims a token in ", layout), shape_text(t));
}

void check_like(const char* op, const char* arg, const Tensor& t, const Tensor& like, const char* layout) {
  check_data(op, arg, t, layout);
  check_dtype(op, arg, t, like.scalar_type());
  check_same_device(op, arg, t, like);
  check_size(op, arg, t, 0, like.size(0), layout);
  check_size(op, arg, t, 3, like.size(3), layout);
}

NormScope check_norm(const char* op, int64_t norm, double eps) {
  RF_CHECK_ARG(norm >= 0 && norm <= 2, op, "norm", "0 (none), 1 (model) or 2 (head)", norm);
  RF_CHECK_ARG(std::isfinite(eps) && eps >= 0, op, "eps", "a finite number >= 0", eps);
  return static_cast<NormScope>(norm);
}

void set_weight(const char* op, const char* arg, const std::optional<Tensor>& weight, const Tensor& data,
                NormScope norm, RopeRows& rows) {
  rows.weight = nullptr;
  rows.float_weight = false;
  if (!weight.has_value()) return;
  RF_CHECK_ARG(norm != NormScope::kNone, op, "norm", concat("\"model\" or \"head\" with `", arg, "`"),
               "None");
  const bool model = norm == NormScope::kModel;
  const char* layout = model ? "[heads * D]" : "[D]";
  check_dim(op, arg, *weight, 1, layout);
  check_size(op, arg, *weight, 0, model ? data.size(2) * data.size(3) : data.size(3), layout);
  check_last_dim_contiguous(op, arg, *weight);
  check_same_device(op, arg, *weight, data);
  RF_CHECK_ARG(weight->scalar_type() == data.scalar_type() || weight->scalar_type() == ScalarType::Float, op,
               arg, concat("dtype ", dtype_text(data.scalar_type()), " (the data's) or float32"),
               dtype_text(weight->scalar_type()));
  rows.weight = weight->const_data_ptr();
  rows.float_weight = weight->scalar_type() != data.scalar_type();
}

void set_angles(const char* op, const std::optional<Tensor>& angles, const std::vector<int64_t>& axes,
                int64_t layout, const Tensor& data, Params& p) {
  RF_CHECK_ARG(layout >= 0 && layout <= 2, op, "layout", "0 (adjacent), 1 (half) or 2 (axis_half)", layout);
  p.axes = {static_cast<RopeLayout>(layout), 0, 0, {}};
  p.angles = nullptr;
  p.angles_batch_stride = 0;
  const int64_t count = static_cast<int64_t>(axes.size()) / 3;
  if (!angles.has_value()) {
    RF_CHECK_ARG(axes.empty(), op, "axes", "no axes where `angles` is None", count, " axes");
    return;
  }
  RF_CHECK_ARG(axes.size() % 3 == 0 && count >= 1 && count <= kMaxRopeAxes, op, "axes",
               concat("[length, pairs, offset] of 1 to ", kMaxRopeAxes, " axes"), axes.size(), " integers");
  check_dim(op, "angles", *angles, 3, "[1 or B, R, 2]");
  check_dtype(op, "angles", *angles,
              data.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_same_device(op, "angles", *angles, data);
  RF_CHECK_ARG(angles->size(0) == 1 || angles->size(0) == data.size(0), op, "angles",
               concat("size 1 or ", data.size(0), " in dimension 0 of [1 or B, R, 2]"), shape_text(*angles));
  check_size(op, "angles", *angles, 2, 2, "[1 or B, R, 2]");
  RF_CHECK_ARG(
      angles->numel() == 0 || (angles->stride(2) == 1 && (angles->size(1) <= 1 || angles->stride(1) == 2)),
      op, "angles", "contiguous rows (cos, sin)", strides_text(*angles));

  const int64_t rows = angles->size(1);
  int64_t tokens = 1, pairs = 0;
  for (int64_t a = 0; a < count; ++a) {
    const int64_t length = axes[3 * a], axis_pairs = axes[3 * a + 1], offset = axes[3 * a + 2];
    RF_CHECK_ARG(length >= 0 && length <= INT32_MAX && axis_pairs >= 0 && axis_pairs <= data.size(3), op,
                 "axes", concat("length in [0, 2^31) and pairs in [0, D] for axis ", a), "length ", length,
                 ", pairs ", axis_pairs);
    // In this order none of the products can overflow: length and pairs are below 2^31, offset is at most R.
    RF_CHECK_ARG(offset >= 0 && offset <= rows && length * axis_pairs <= rows - offset, op, "axes",
                 concat("rows of axis ", a, " within the ", rows, " rows of `angles`"), "offset ", offset,
                 ", ", length, " x ", axis_pairs, " rows");
    tokens *= length;
    RF_CHECK_ARG(tokens <= INT32_MAX, op, "axes", concat("lengths whose product is N = ", data.size(1)),
                 "a product of 2^31 or more");
    pairs += axis_pairs;
    p.axes.axis[a] = {static_cast<int32_t>(length), static_cast<int32_t>(axis_pairs), offset};
  }
  RF_CHECK_ARG(tokens == data.size(1), op, "axes", concat("lengths whose product is N = ", data.size(1)),
               "a product of ", tokens);
  RF_CHECK_ARG(2 * pairs <= data.size(3), op, "axes", concat("at most D / 2 pairs, D = ", data.size(3)),
               pairs, " pairs");
  p.axes.count = static_cast<int32_t>(count);
  p.axes.pairs = static_cast<int32_t>(pairs);
  p.angles = angles->const_data_ptr();
  p.angles_batch_stride = angles->size(0) == 1 ? 0 : angles->stride(0);
}

void check_cache(const char* arg, const Tensor& cache, const Tensor& k) {
  check_like(kRopeAppend, arg, cache, k, "[B, T, Hkv, D]");
  check_size(kRopeAppend, arg, cache, 2, k.size(2), "[B, T, Hkv, D]");
  check_no_self_overlap(kRopeAppend, arg, cache);
}

// The slots' values: on the CPU they are checked, two equal slots of a sample would race. On a GPU reading
// them would stall the stream: there the kernel leaves out what has no place in the cache.
void check_slot_values(const Tensor& slots, const Params& p, int64_t frames) {
  const int64_t capacity = p.frame_tokens > 0 ? p.cache_tokens / p.frame_tokens : INT32_MAX;
  const int64_t samples = slots.dim() == 2 ? slots.size(0) : 1;
  std::unordered_map<int64_t, int64_t> frame_of;
  frame_of.reserve(static_cast<size_t>(frames));
  for (int64_t b = 0; b < samples; ++b) {
    const int32_t* row = p.slots + b * p.slots_batch_stride;
    frame_of.clear();
    for (int64_t f = 0; f < frames; ++f) {
      const int64_t slot = row[f * p.slots_stride];
      RF_CHECK_ARG(slot >= 0 && slot < capacity, kRopeAppend, "slots",
                   concat("frame slots in [0, ", capacity, ")"), slot, " for frame ", f);
      const auto [first, is_new] = frame_of.emplace(slot, f);
      RF_CHECK_ARG(is_new, kRopeAppend, "slots", "a slot of its own for every frame of a sample", "slot ",
                   slot, " for frames ", first->second, " and ", f);
    }
  }
}

void set_slots(const Tensor& slots, const Tensor& q, Params& p) {
  const char* layout = "[F] or [B, F]";
  RF_CHECK_ARG(slots.dim() == 1 || slots.dim() == 2, kRopeAppend, "slots", concat("shape ", layout),
               shape_text(slots));
  check_dtype(kRopeAppend, "slots", slots, ScalarType::Int);
  check_same_device(kRopeAppend, "slots", slots, q);
  if (slots.dim() == 2) check_size(kRopeAppend, "slots", slots, 0, q.size(0), layout);
  const int64_t frames = slots.size(slots.dim() - 1);
  RF_CHECK_ARG(frames > 0 ? q.size(1) % frames == 0 : q.size(1) == 0, kRopeAppend, "slots",
               concat("a number of frames that divides N = ", q.size(1)), frames, " frames");
  p.slots = static_cast<const int32_t*>(slots.const_data_ptr());
  p.slots_batch_stride = slots.dim() == 2 ? slots.stride(0) : 0;
  p.slots_stride = slots.stride(slots.dim() - 1);
  p.frame_tokens = frames > 0 ? static_cast<int32_t>(q.size(1) / frames) : 0;
  if (slots.is_cpu()) check_slot_values(slots, p, frames);
}

void check_overlaps(const char* arg, const Tensor& cache,
                    std::initializer_list<std::pair<const char*, const Tensor*>> others) {
  for (const auto& [name, tensor] : others)
    if (tensor != nullptr) check_no_overlap(kRopeAppend, arg, cache, name, *tensor);
}

const Tensor* address(const std::optional<Tensor>& t) {
  return t.has_value() ? &*t : nullptr;
}

// ---- the two ops, and where they run ----

template <typename Triton>
void run(const char* op, const Tensor& data, const Params& p, Triton triton) {
  run_where_tensors_are(
      op, data, [&] { return run_cpu(p); },
      [&](void* stream) {
        const Config config = choose_config(p);
        check_cuda(op, run_cuda(p, config, stream));
        return config.reason;
      },
      triton);
}

bool empty(const Tensor& t) {
  return t.numel() == 0;
}

Tensor rope(const Tensor& x, const std::optional<Tensor>& angles, std::vector<int64_t> axes, int64_t layout,
            const std::optional<Tensor>& weight, int64_t norm, double eps) {
  Params p{};
  check_data(kRope, "x", x, "[B, N, H, D]");
  p.dtype = checked_dtype(kRope, "x", x);
  p.norm = check_norm(kRope, norm, eps);
  p.eps = eps;
  set_angles(kRope, angles, axes, layout, x, p);
  set_weight(kRope, "weight", weight, x, p.norm, p.q);

  Tensor out = torch::stable::new_empty(x, x.sizes());
  p.batch = x.size(0);
  p.tokens = static_cast<int32_t>(x.size(1));
  p.head_dim = static_cast<int32_t>(x.size(3));
  p.q.in = rows_of(x);
  p.q.out = mutable_rows_of(out);
  p.q.heads = static_cast<int32_t>(x.size(2));
  if (!empty(x))
    run(kRope, x, p, [&] { call_triton(kRope, x, angles, axes, layout, weight, norm, eps, out); });
  return out;
}

// Every check of rope_append, and what they found out. As an op of its own (rope_append_check) it serves
// callers that write something else first: the cache fuses the leaving frames before it appends, and must
// know that the append will not be refused.
Params checked_rope_append(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
                           const Tensor& k_cache, const std::optional<Tensor>& v_cache, const Tensor& slots,
                           const std::optional<Tensor>& angles, const std::vector<int64_t>& axes,
                           int64_t layout, const std::optional<Tensor>& q_weight,
                           const std::optional<Tensor>& k_weight, int64_t norm, double eps) {
  Params p{};
  check_data(kRopeAppend, "q", q, "[B, N, Hq, D]");
  p.dtype = checked_dtype(kRopeAppend, "q", q);
  check_like(kRopeAppend, "k", k, q, "[B, N, Hkv, D]");
  check_size(kRopeAppend, "k", k, 1, q.size(1), "[B, N, Hkv, D]");
  RF_CHECK_ARG(v.has_value() || !v_cache.has_value(), kRopeAppend, "v",
               "a tensor with `v_cache`, or both None", "None");
  RF_CHECK_ARG(v_cache.has_value() || !v.has_value(), kRopeAppend, "v_cache",
               "a tensor with `v`, or both None", "None");
  if (v.has_value()) {
    check_like(kRopeAppend, "v", *v, q, "[B, N, Hkv, D]");
    check_size(kRopeAppend, "v", *v, 1, q.size(1), "[B, N, Hkv, D]");
    check_size(kRopeAppend, "v", *v, 2, k.size(2), "[B, N, Hkv, D]");
  }
  check_cache("k_cache", k_cache, k);
  if (v_cache.has_value()) {
    check_cache("v_cache", *v_cache, k);
    check_size(kRopeAppend, "v_cache", *v_cache, 1, k_cache.size(1), "[B, T, Hkv, D]");
  }
  p.norm = check_norm(kRopeAppend, norm, eps);
  p.eps = eps;
  p.cache_tokens = k_cache.size(1);
  set_angles(kRopeAppend, angles, axes, layout, q, p);
  set_weight(kRopeAppend, "q_weight", q_weight, q, p.norm, p.q);
  set_weight(kRopeAppend, "k_weight", k_weight, k, p.norm, p.k);
  set_slots(slots, q, p);
  check_overlaps("k_cache", k_cache,
                 {{"q", &q},
                  {"k", &k},
                  {"v", address(v)},
                  {"v_cache", address(v_cache)},
                  {"slots", &slots},
                  {"angles", address(angles)},
                  {"q_weight", address(q_weight)},
                  {"k_weight", address(k_weight)}});
  if (v_cache.has_value())
    check_overlaps("v_cache", *v_cache,
                   {{"q", &q},
                    {"k", &k},
                    {"v", address(v)},
                    {"slots", &slots},
                    {"angles", address(angles)},
                    {"q_weight", address(q_weight)},
                    {"k_weight", address(k_weight)}});

  p.batch = q.size(0);
  p.tokens = static_cast<int32_t>(q.size(1));
  p.head_dim = static_cast<int32_t>(q.size(3));
  p.q.in = rows_of(q);
  p.q.heads = static_cast<int32_t>(q.size(2));
  p.k.in = rows_of(k);
  p.k.out = mutable_rows_of(k_cache);
  p.k.heads = static_cast<int32_t>(k.size(2));
  if (v.has_value()) {
    p.v = rows_of(*v);
    p.v_cache = mutable_rows_of(*v_cache);
  }
  return p;
}

void rope_append_check(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v,
                       const Tensor& k_cache, const std::optional<Tensor>& v_cache, const Tensor& slots,
                       const std::optional<Tensor>& angles, std::vector<int64_t> axes, int64_t layout,
                       const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                       int64_t norm, double eps) {
  checked_rope_append(q, k, v, k_cache, v_cache, slots, angles, axes, layout, q_weight, k_weight, norm, eps);
}

Tensor rope_append(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v, const Tensor& k_cache,
                   const std::optional<Tensor>& v_cache, const Tensor& slots,
                   const std::optional<Tensor>& angles, std::vector<int64_t> axes, int64_t layout,
                   const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, int64_t norm,
                   double eps) {
  Params p = checked_rope_append(q, k, v, k_cache, v_cache, slots, angles, axes, layout, q_weight, k_weight,
                                 norm, eps);
  Tensor q_out = torch::stable::new_empty(q, q.sizes());
  p.q.out = mutable_rows_of(q_out);
  if (!empty(q) || !empty(k))
    run(kRopeAppend, q, p, [&] {
      call_triton(kRopeAppend, q, k, v, k_cache, v_cache, slots, angles, axes, layout, q_weight, k_weight,
                  norm, eps, q_out);
    });
  return q_out;
}

}  // namespace
}  // namespace rf::rope_append

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CPU, m) {
  m.impl("rope", TORCH_BOX(&rf::rope_append::rope));
  m.impl("rope_append", TORCH_BOX(&rf::rope_append::rope_append));
  m.impl("rope_append_check", TORCH_BOX(&rf::rope_append::rope_append_check));
}

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, Meta, m) {
  m.impl("traced_rope", TORCH_BOX(&rf::rope_append::rope));
  m.impl("traced_rope_append", TORCH_BOX(&rf::rope_append::rope_append));
  m.impl("traced_rope_append_check", TORCH_BOX(&rf::rope_append::rope_append_check));
}

// Registered in every build: without a CUDA part the call says so.
STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CUDA, m) {
  m.impl("rope", TORCH_BOX(&rf::rope_append::rope));
  m.impl("rope_append", TORCH_BOX(&rf::rope_append::rope_append));
  m.impl("rope_append_check", TORCH_BOX(&rf::rope_append::rope_append_check));
}
