// The one list of what this library registers: a schema line per op, Tensor(a!) on what is mutated. Each op's
// implementations are registered in its own csrc/<op>/op.cpp.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "csrc/common/check.h"
#include "rf_build_info.h"

namespace {
// Facts of the build as JSON (CMake writes them), for `python -m rf_kernels.doctor`.
std::string build_info() {
  return kBuildInfo;
}
}  // namespace

STABLE_TORCH_LIBRARY(rf_kernels, m) {
  m.def("build_info() -> str");
  m.def("last_dispatch() -> (int op, int backend, int reason, bool fallback)");
  m.def("cuda_problem() -> str");
  m.def("backend() -> int");
  m.def("set_backend(int request) -> ()");
  m.def("set_triton(bool interpreted, bool rocm) -> ()");
  // Each op twice: "traced_" on meta tensors makes the checks of the op and nothing else, while a compiler
  // traces.
  const auto define = [&m](const char* name, const char* signature) {
    m.def(rf::concat(name, signature).c_str());
    m.def(rf::concat("traced_", name, signature).c_str());
  };
  define(
      "ema_evict",
      "(Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor(c!)? k_state, Tensor(d!)? k_state_lo, "
      "Tensor(e!)? v_state, Tensor schedule, Tensor turns, Tensor alpha, int frame_tokens, int[] temporal, "
      "int state, bool skip_nonfinite, Tensor(f!)? skipped) -> ()");
  define("sink_window_attention",
         "(Tensor q, Tensor k, Tensor v, SymInt? kv_tokens, float softmax_scale, "
         "int[]? chunk_ends, int num_sink_tokens, int? num_window_tokens, bool deterministic=False, "
         "Tensor? row_kv_tokens=None, Tensor? kv_bias=None) -> (Tensor out, Tensor lse)");
  m.def(
      "sink_window_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "SymInt? kv_tokens, float softmax_scale, int[]? chunk_ends, int num_sink_tokens, "
      "int? num_window_tokens, Tensor? row_kv_tokens=None, Tensor? kv_bias=None) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  define("rope",
         "(Tensor x, Tensor? angles, int[] axes, int layout, Tensor? weight, int norm, float eps) -> "
         "Tensor");
  define(
      "rope_append_check",
      "(Tensor q, Tensor k, Tensor? v, Tensor k_cache, Tensor? v_cache, Tensor slots, "
      "Tensor? angles, int[] axes, int layout, Tensor? q_weight, Tensor? k_weight, int norm, float eps) -> "
      "()");
  define(
      "rope_append",
      "(Tensor q, Tensor k, Tensor? v, Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor slots, "
      "Tensor? angles, int[] axes, int layout, Tensor? q_weight, Tensor? k_weight, int norm, float eps) -> "
      "Tensor");
  define(
      "dmd_gradient",
      "(Tensor x, Tensor fake, Tensor real, Tensor? fake_uncond, Tensor? real_uncond, "
      "float fake_guidance, float real_guidance, Tensor? x_t, Tensor? sigma, Tensor? weight, Tensor? mask, "
      "bool normalize, float eps, float floor, int nan, int reduction, bool scale_gradient) -> "
      "(Tensor gradient, Tensor loss, Tensor per_sample_loss, Tensor gradient_norm, Tensor normalizer, "
      "Tensor dropped, Tensor scale)");

  // The same calls, checked, with their outputs: what rf_kernels/triton implements.
  m.def(
      "triton_ema_evict(Tensor(a!) k_cache, Tensor(b!)? v_cache, Tensor(c!)? k_state, Tensor(d!)? "
      "k_state_lo, "
      "Tensor(e!)? v_state, Tensor schedule, Tensor turns, Tensor alpha, int frame_tokens, int[] temporal, "
      "int state, bool skip_nonfinite, Tensor(f!)? skipped) -> ()");
  m.def(
      "triton_sink_window_attention(Tensor q, Tensor k, Tensor v, int? kv_tokens, float softmax_scale, "
      "int[]? chunk_ends, int num_sink_tokens, int? num_window_tokens, Tensor? row_kv_tokens, "
      "Tensor? kv_bias, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "triton_sink_window_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, int? kv_tokens, float softmax_scale, int[]? chunk_ends, int num_sink_tokens, "
      "int? num_window_tokens, Tensor? row_kv_tokens, Tensor? kv_bias, Tensor(a!) grad_q, "
      "Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
  m.def(
      "triton_rope(Tensor x, Tensor? angles, int[] axes, int layout, Tensor? weight, int norm, float eps, "
      "Tensor(a!) out) -> ()");
  m.def(
      "triton_rope_append(Tensor q, Tensor k, Tensor? v, Tensor(a!) k_cache, Tensor(b!)? v_cache, "
      "Tensor slots, Tensor? angles, int[] axes, int layout, Tensor? q_weight, Tensor? k_weight, int norm, "
      "float eps, Tensor(c!) q_out) -> ()");
  m.def(
      "triton_dmd_gradient(Tensor x, Tensor fake, Tensor real, Tensor? fake_uncond, Tensor? real_uncond, "
      "float fake_guidance, float real_guidance, Tensor? x_t, Tensor? sigma, Tensor? weight, Tensor? mask, "
      "bool normalize, float eps, float floor, int nan, int reduction, bool scale_gradient, Tensor(a!) "
      "gradient, "
      "Tensor(b!) loss, Tensor(c!) per_sample_loss, Tensor(d!) gradient_norm, Tensor(e!) normalizer, "
      "Tensor(f!) dropped, Tensor(g!) scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rf_kernels, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}

// An empty module: importing it loads the library, and loading the library registers the ops.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
