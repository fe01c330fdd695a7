// One instantiation of the attention kernel for the model. Compiled several times: CHIP_NAME, CHIP_ELEMENT,
// CHIP_CONFIG, CHIP_TRAITS say which. A planted fault is this file with one header of csrc replaced and
// -Drf=<name>, so that its symbols are its own.
#include <cstddef>

#include "csrc/arch/tensor_map.h"
#include "csrc/sink_window_attention/sm90/kernel.h"
#include "tests/chip/variants.h"

namespace rf::sink_window_attention {
inline constexpr FwdConfig with_polynomial_blocks(FwdConfig config, int blocks) {
  config.polynomial_blocks = blocks;
  return config;
}
inline constexpr FwdConfig kPolynomialHeadDim64 = with_polynomial_blocks(kFwdConfigHeadDim64, 1);
}  // namespace rf::sink_window_attention

namespace {

namespace op = rf::sink_window_attention;

constexpr const op::FwdConfig& kConfig = op::CHIP_CONFIG;
using Traits = op::CHIP_TRAITS<rf::CHIP_ELEMENT, kConfig>;
using Smem = Traits::Smem;

struct State {
  rf::arch::TensorMap q, k, v;
  op::FwdKernelParams params;
};

const char* setup(const void* params, void* memory, chip_tests::GridShape* shape) {
  auto p = *static_cast<const op::SinkWindowAttentionParams*>(params);
  if (const char* reason = op::unsupported_sm90(p)) return reason;
  const rf::TileSchedule schedule = op::plan_sm90(p, kConfig);
  p.schedule = &schedule;
  auto& state = *static_cast<State*>(memory);
  rf::arch::encode_tensor_map(&state.q, op::q_source(p));
  rf::arch::encode_tensor_map(&state.k, op::k_source(p, kConfig));
  rf::arch::encode_tensor_map(&state.v, op::v_source(p, kConfig));
  state.params = op::fwd_kernel_params(p, kConfig);
  constexpr size_t kStages = Traits::kStages, kWarpgroups = Traits::kWarpgroups;
  *shape = {state.params.schedule.ranges,
            Traits::kThreads,
            kConfig.launch_registers(),
            sizeof(Smem),
            {{"q", offsetof(Smem, q), Traits::kQBytes, kWarpgroups},
             {"k", offsetof(Smem, k), Traits::kKvBytes, kStages},
             {"v", offsetof(Smem, v), Traits::kKvBytes, kStages},
             {"q_full", offsetof(Smem, q_full), 8, kWarpgroups},
             {"q_empty", offsetof(Smem, q_empty), 8, kWarpgroups},
             {"k_full", offsetof(Smem, k_full), 8, kStages},
             {"k_empty", offsetof(Smem, k_empty), 8, kStages},
             {"v_full", offsetof(Smem, v_full), 8, kStages},
             {"v_empty", offsetof(Smem, v_empty), 8, kStages},
             {"ticket", offsetof(Smem, ticket), 4, 1}},
            10,
            0,
            0};
  if (schedule.cuts_tiles()) {
    const op::Workspace workspace = op::workspace_sm90(kConfig, schedule.ranges);
    shape->workspace_bytes = workspace.bytes;
    shape->zeroed_bytes = workspace.zeroed();
  }
  return nullptr;
}

void thread(const void* memory) {
  const auto& state = *static_cast<const State*>(memory);
  op::attention_forward_sm90<Traits>(&state.q, &state.k, &state.v, state.params);
}

const chip_tests::Registration registration({CHIP_NAME, Traits::kHeadDim,
                                             std::is_same_v<rf::CHIP_ELEMENT, rf::f16>, Traits::kRows,
                                             sizeof(State), setup, thread});

}  // namespace
