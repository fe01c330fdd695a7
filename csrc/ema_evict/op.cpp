// ema_evict for PyTorch: every argument check (before the first write), parameters, choice of backend.
#include <algorithm>
#include <vector>

#include "csrc/common/dispatch.h"
#include "csrc/ema_evict/launch.h"

namespace rf::ema_evict {
namespace {

constexpr const char* kOp = "ema_evict";
using OptionalTensor = std::optional<Tensor>;

void check_caches(const Tensor& k_cache, const OptionalTensor& v_cache, int64_t frame_tokens) {
  check_dim(kOp, "k_cache", k_cache, 4, "[B, T, H, D]");
  checked_dtype(kOp, "k_cache", k_cache);
  check_last_dim_contiguous(kOp, "k_cache", k_cache);
  check_no_self_overlap(kOp, "k_cache", k_cache);
  if (v_cache.has_value()) {
    check_dim(kOp, "v_cache", *v_cache, 4, "[B, T, H, D]");
    for (int64_t d = 0; d < 4; ++d)
      check_size(kOp, "v_cache", *v_cache, d, k_cache.size(d), "k_cache's [B, T, H, D]");
    check_dtype(kOp, "v_cache", *v_cache, k_cache.scalar_type());
    check_same_device(kOp, "v_cache", *v_cache, k_cache);
    check_last_dim_contiguous(kOp, "v_cache", *v_cache);
    check_no_self_overlap(kOp, "v_cache", *v_cache);
  }
  RF_CHECK_ARG(product_fits_int32(k_cache.size(2), k_cache.size(3)), kOp, "k_cache", "H * D below 2^31",
               shape_text(k_cache));
  RF_CHECK_ARG(frame_tokens >= 1, kOp, "frame_tokens", "at least 1", frame_tokens);
  RF_CHECK_ARG(k_cache.size(1) % frame_tokens == 0, kOp, "frame_tokens",
               concat("a divisor of the cache's ", k_cache.size(1), " tokens"), frame_tokens);
}

// schedule, turns and alpha: what a frame slot does. Returns S.
int64_t check_plan(const Tensor& k_cache, const Tensor& schedule, const Tensor& turns, const Tensor& alpha,
                   int64_t frame_tokens) {
  const int64_t batch = k_cache.size(0);
  check_dtype(kOp, "schedule", schedule, ScalarType::Int);
  check_same_device(kOp, "schedule", schedule, k_cache);
  RF_CHECK_ARG((schedule.dim() == 2 || schedule.dim() == 3) && schedule.size(schedule.dim() - 1) >= 2, kOp,
               "schedule", "shape [S, 2 + E] or [B, S, 2 + E]", shape_text(schedule));
  if (schedule.dim() == 3) check_size(kOp, "schedule", schedule, 0, batch, "[B, S, 2 + E]");
  RF_CHECK_ARG(schedule.is_contiguous(), kOp, "schedule", "a contiguous tensor", strides_text(schedule));
  const int64_t sink_frames = schedule.size(schedule.dim() - 2);
  const int64_t sources = schedule.size(schedule.dim() - 1) - 2;
  RF_CHECK_ARG(sink_frames * frame_tokens <= k_cache.size(1), kOp, "schedule",
               concat("at most ", k_cache.size(1) / frame_tokens, " sink frames (the cache's frame slots)"),
               sink_frames);

  const bool wide = k_cache.scalar_type() == ScalarType::Double;
  check_dtype(kOp, "turns", turns, wide ? ScalarType::Double : ScalarType::Float);
  check_same_device(kOp, "turns", turns, k_cache);
  const char* layout = "[S, E + 1, nt, 2] or [B, S, E + 1, nt, 2]";
  RF_CHECK_ARG(turns.dim() == 4 || turns.dim() == 5, kOp, "turns", concat("shape ", layout),
               shape_text(turns));
  const int64_t lead = turns.dim() - 4;
  if (lead == 1) check_size(kOp, "turns", turns, 0, batch, layout);
  check_size(kOp, "turns", turns, lead, sink_frames, layout);
  check_size(kOp, "turns", turns, lead + 1, sources + 1, layout);
  check_size(kOp, "turns", turns, lead + 3, 2, layout);
  RF_CHECK_ARG(turns.is_contiguous(), kOp, "turns", "a contiguous tensor", strides_text(turns));
  RF_CHECK_ARG(2 * turns.size(lead + 2) <= k_cache.size(3), kOp, "turns",
               concat("at most D / 2 = ", k_cache.size(3) / 2, " temporal pairs"), turns.size(lead + 2));

  check_dtype(kOp, "alpha", alpha, ScalarType::Double);
  check_same_device(kOp, "alpha", alpha, k_cache);
  RF_CHECK_ARG(alpha.dim() <= 2, kOp, "alpha", "shape [], [S] or [S, n]", shape_text(alpha));
  if (alpha.dim() >= 1) check_size(kOp, "alpha", alpha, 0, sink_frames, "[S] or [S, n]");
  if (alpha.dim() == 2) check_size(kOp, "alpha", alpha, 1, frame_tokens, "[S, n]");
  return sink_frames;
}

// Temporal pair i is dims (x0 + i * step, y0 + i * step): neighbours (step 2) or two runs (step 1).
void check_temporal(const std::vector<int64_t>& temporal, int64_t pairs, int64_t head_dim) {
  RF_CHECK_ARG(temporal.size() == 3, kOp, "temporal", "3 integers (x0, y0, step)", temporal.size(),
               " of them");
  if (pairs == 0) return;
  const int64_t x0 = temporal[0], y0 = temporal[1], step = temporal[2];
  const bool neighbours = step == 2 && y0 == x0 + 1;
  const bool runs = step == 1 && y0 >= x0 + pairs;
  RF_CHECK_ARG(
      x0 >= 0 && x0 < head_dim && y0 < head_dim && (neighbours || runs) && y0 + (pairs - 1) * step < head_dim,
      kOp, "temporal",
      concat("(x0, x0 + 1, 2) or (x0, y0 >= x0 + ", pairs, ", 1) with ", pairs, " pairs inside ", head_dim,
             " dims"),
      "(", x0, ", ", y0, ", ", step, ")");
}

void check_state(const char* arg, const OptionalTensor& state, const Tensor& k_cache, int64_t tokens,
                 ScalarType dtype) {
  RF_CHECK_ARG(state.has_value(), kOp, arg, concat("a tensor [B, S*n, H, D] of dtype ", dtype_text(dtype)),
               "None");
  const char* layout = "[B, S*n, H, D]";
  check_dim(kOp, arg, *state, 4, layout);
  check_size(kOp, arg, *state, 0, k_cache.size(0), layout);
  check_size(kOp, arg, *state, 1, tokens, layout);
  check_size(kOp, arg, *state, 2, k_cache.size(2), layout);
  check_size(kOp, arg, *state, 3, k_cache.size(3), layout);
  check_dtype(kOp, arg, *state, dtype);
  check_same_device(kOp, arg, *state, k_cache);
  RF_CHECK_ARG(state->is_contiguous(), kOp, arg, "a contiguous tensor", strides_text(*state));
}

void check_none(const char* arg, const OptionalTensor& state, const char* why) {
  RF_CHECK_ARG(!state.has_value(), kOp, arg, concat("None (", why, ")"), "a tensor");
}

void check_states(const Tensor& k_cache, bool has_values, const OptionalTensor& k_state,
                  const OptionalTensor& k_state_lo, const OptionalTensor& v_state, int64_t tokens,
                  int64_t pairs, EmaState state) {
  const ScalarType t = k_cache.scalar_type();
  const ScalarType k_dtype = state == EmaState::kFloat32 ? ScalarType::Float : t;
  if (k_state.has_value() || pairs > 0 || state == EmaState::kFloat32)
    check_state("k_state", k_state, k_cache, tokens, k_dtype);
  if (state == EmaState::kCompensated)
    check_state("k_state_lo", k_state_lo, k_cache, tokens, t);
  else
    check_none("k_state_lo", k_state_lo, "only a compensated state of a half-precision cache has a low part");
  if (!has_values)
    check_none("v_state", v_state, "there is no `v_cache`");
  else if (state == EmaState::kPublished)
    check_none("v_state", v_state, "the value slots are the state");
  else
    check_state("v_state", v_state, k_cache, tokens, state == EmaState::kFloat32 ? ScalarType::Float : t);
}

// Everything that is written lies apart from everything else.
void check_apart(const std::vector<std::pair<const char*, const Tensor*>>& written,
                 const std::vector<std::pair<const char*, const Tensor*>>& read) {
  for (size_t i = 0; i < written.size(); ++i) {
    for (size_t j = 0; j < i; ++j)
      check_no_overlap(kOp, written[i].first, *written[i].second, written[j].first, *written[j].second);
    for (const auto& [name, tensor] : read)
      check_no_overlap(kOp, written[i].first, *written[i].second, name, *tensor);
  }
}

// The CPU can look at the values: a source read by two sink frames, or a sink slot as a source, would make
// the result depend on the order of the threads.
void check_values(const Params& p, const Tensor& schedule, const Tensor& alpha) {
  const int64_t plans = schedule.dim() == 3 ? p.batch : 1;
  std::vector<char> taken(static_cast<size_t>(p.frames));
  for (int64_t b = 0; b < plans; ++b) {
    std::fill(taken.begin(), taken.end(), 0);
    for (int64_t j = 0; j < p.sink_frames; ++j) {
      const int32_t* entry = p.schedule + (b * p.sink_frames + j) * (2 + p.sources);
      RF_CHECK_ARG(entry[0] == 0 || entry[0] == 1, kOp, "schedule",
                   concat("init of sink frame ", j, " to be 0 or 1"), entry[0]);
      RF_CHECK_ARG(entry[1] >= 0 && entry[1] <= p.sources, kOp, "schedule",
                   concat("count of sink frame ", j, " in 0..", p.sources), entry[1]);
      for (int32_t i = 0; i < entry[1]; ++i) {
        const int32_t source = entry[2 + i];
        RF_CHECK_ARG(source >= p.sink_frames && source < p.frames, kOp, "schedule",
                     concat("source slots in ", p.sink_frames, "..", p.frames - 1), source,
                     " for sink frame ", j);
        RF_CHECK_ARG(!taken[source], kOp, "schedule", "each source slot once", source,
                     " again for sink frame ", j);
        taken[source] = 1;
      }
    }
  }
  const int64_t per_frame = alpha.dim() >= 1 ? p.sink_frames : 1;
  const int64_t per_token = alpha.dim() == 2 ? p.frame_tokens : 1;
  for (int64_t j = 0; j < per_frame; ++j)
    for (int64_t t = 0; t < per_token; ++t) {
      const double a = p.alpha[j * p.alpha_stride_frame + t * p.alpha_stride_token];
      RF_CHECK_ARG(a >= 0 && a <= 1, kOp, "alpha", "values in [0, 1]", a);
    }
}

}  // namespace

void evict(Tensor k_cache, OptionalTensor v_cache, OptionalTensor k_state, OptionalTensor k_state_lo,
           OptionalTensor v_state, Tensor schedule, Tensor turns, Tensor alpha, int64_t frame_tokens,
           std::vector<int64_t> temporal, int64_t state_name, bool skip_nonfinite, OptionalTensor skipped) {
  check_caches(k_cache, v_cache, frame_tokens);
  RF_CHECK_ARG(state_name >= 0 && state_name <= 2, kOp, "state",
               "0 (compensated), 1 (float32) or 2 (published)", state_name);
  const bool half = k_cache.element_size() == 2;
  // float32 and float64 carry the average well enough: their state is the cache's dtype alone.
  const EmaState state = half ? static_cast<EmaState>(state_name) : EmaState::kPublished;
  const int64_t sink_frames = check_plan(k_cache, schedule, turns, alpha, frame_tokens);
  const int64_t lead = turns.dim() - 4;
  const int64_t pairs = turns.size(lead + 2);
  check_temporal(temporal, pairs, k_cache.size(3));
  check_states(k_cache, v_cache.has_value(), k_state, k_state_lo, v_state, sink_frames * frame_tokens, pairs,
               state);

  std::vector<std::pair<const char*, const Tensor*>> written{{"k_cache", &k_cache}};
  if (v_cache) written.emplace_back("v_cache", &*v_cache);
  if (k_state) written.emplace_back("k_state", &*k_state);
  if (k_state_lo) written.emplace_back("k_state_lo", &*k_state_lo);
  if (v_state) written.emplace_back("v_state", &*v_state);
  if (skipped) {
    check_dtype(kOp, "skipped", *skipped, ScalarType::Long);
    check_same_device(kOp, "skipped", *skipped, k_cache);
    RF_CHECK_ARG(skipped->numel() == 1, kOp, "skipped", "one element", shape_text(*skipped));
    written.emplace_back("skipped", &*skipped);
  }
  check_apart(written, {{"schedule", &schedule}, {"turns", &turns}, {"alpha", &alpha}});

  Params p{};
  p.dtype = checked_dtype(kOp, "k_cache", k_cache);
  p.state = state;
  p.k_cache = k_cache.mutable_data_ptr();
  p.k_state = k_state ? k_state->mutable_data_ptr() : nullptr;
  p.k_state_lo = k_state_lo ? k_state_lo->mutable_data_ptr() : nullptr;
  // Keys alone: what a lane without values reads of them is the keys' (held.h), and is not written.
  const Tensor& values = v_cache ? *v_cache : k_cache;
  p.v_cache = values.mutable_data_ptr();
  if (!v_cache)
    p.v_state = state == EmaState::kFloat32 ? p.k_state : p.k_state_lo;
  else
    p.v_state = v_state ? v_state->mutable_data_ptr() : nullptr;
  p.schedule = static_cast<const int32_t*>(schedule.const_data_ptr());
  p.turns = turns.const_data_ptr();
  p.alpha = static_cast<const double*>(alpha.const_data_ptr());
  p.skipped = skipped ? static_cast<int64_t*>(skipped->mutable_data_ptr()) : nullptr;
  p.batch = k_cache.size(0);
  p.frames = k_cache.size(1) / frame_tokens;
  p.sink_frames = sink_frames;
  p.frame_tokens = frame_tokens;
  p.heads = static_cast<int32_t>(k_cache.size(2));
  p.head_dim = static_cast<int32_t>(k_cache.size(3));
  p.sources = static_cast<int32_t>(schedule.size(schedule.dim() - 1) - 2);
  p.temporal_pairs = static_cast<int32_t>(pairs);
  // Without temporal pairs the three numbers mean nothing: the layout of a head without a span to avoid.
  p.x0 = pairs ? static_cast<int32_t>(temporal[0]) : 0;
  p.y0 = pairs ? static_cast<int32_t>(temporal[1]) : 1;
  p.step = pairs ? static_cast<int32_t>(temporal[2]) : 2;
  p.k_stride_b = k_cache.stride(0);
  p.k_stride_t = k_cache.stride(1);
  p.k_stride_h = k_cache.stride(2);
  p.v_stride_b = values.stride(0);
  p.v_stride_t = values.stride(1);
  p.v_stride_h = values.stride(2);
  p.schedule_stride_b = schedule.dim() == 3 ? schedule.stride(0) : 0;
  p.turns_stride_b = lead == 1 ? turns.stride(0) : 0;
  p.alpha_stride_frame = alpha.dim() >= 1 ? alpha.stride(0) : 0;
  p.alpha_stride_token = alpha.dim() == 2 ? alpha.stride(1) : 0;
  p.skip_nonfinite = skip_nonfinite;

  if (is_meta(k_cache)) return;
  if (k_cache.is_cpu()) check_values(p, schedule, alpha);
  if (k_cache.numel() == 0 || sink_frames == 0) {
    record_dispatch(kOp, k_cache.is_cpu() ? "cpu" : "cuda", "nothing to do");
    return;
  }
  run_where_tensors_are(
      kOp, k_cache, [&] { return run_cpu(p); },
      [&](void* stream) {
        const Config config = choose_config(p);
        check_cuda(kOp, run_cuda(p, config, stream));
        return config.reason;
      },
      [&] {
        call_triton(kOp, k_cache, v_cache, k_state, k_state_lo, v_state, schedule, turns, alpha, frame_tokens,
                    temporal, state_name, skip_nonfinite, skipped);
      });
}

}  // namespace rf::ema_evict

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CPU, m) {
  m.impl("ema_evict", TORCH_BOX(&rf::ema_evict::evict));
}
STABLE_TORCH_LIBRARY_IMPL(rf_kernels, Meta, m) {
  m.impl("traced_ema_evict", TORCH_BOX(&rf::ema_evict::evict));
}
STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CUDA, m) {
  m.impl("ema_evict", TORCH_BOX(&rf::ema_evict::evict));
}
