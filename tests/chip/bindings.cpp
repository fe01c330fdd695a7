// _chip: the Hopper kernels on the functional model, on numpy arrays. For tests only; no wheel contains it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>

#include "csrc/math/key_intervals.h"
#include "csrc/math/special.h"
#include "csrc/sink_window_attention/sm90/config.h"
#include "csrc/sink_window_attention/sm90/schedule_cache.h"
#include "tests/chip/model/launch.h"
#include "tests/chip/model/layouts.h"
#include "tests/chip/probes.h"
#include "tests/chip/variants.h"

namespace py = pybind11;

namespace chip_tests {

static std::map<std::string, Variant>& variants() {
  static std::map<std::string, Variant> all;
  return all;
}
Registration::Registration(const Variant& variant) {
  variants().emplace(variant.name, variant);
}

using Array16 = py::array_t<uint16_t>;

// [B, T, H, D] of 16-bit elements, any strides but the last.
static rf::sink_window_attention::TokenStrides strides_of(const Array16& x) {
  if (x.ndim() != 4 || x.strides(3) != 2)
    throw py::value_error("expected [B, T, H, D] with a contiguous last dimension");
  return {x.strides(0) / 2, x.strides(1) / 2, x.strides(2) / 2};
}
static chip::GlobalBuffer buffer_of(const char* name, const py::array& x) {
  size_t bytes = static_cast<size_t>(x.itemsize());
  for (py::ssize_t d = 0; d < x.ndim(); ++d) bytes += static_cast<size_t>(x.strides(d)) * (x.shape(d) - 1);
  return {name, const_cast<void*>(x.data()), bytes};
}

static chip::LaunchOptions options_of(int policy, uint32_t seed, int resident) {
  chip::LaunchOptions o;
  o.policy = static_cast<chip::Policy>(policy);
  o.seed = seed;
  o.resident = resident;
  return o;
}
static py::dict stats_of(const chip::LaunchStats& s) {
  py::dict d;
  d["switches"] = s.switches;
  d["wgmma"] = s.wgmma;
  d["tma"] = s.tma;
  d["global_written"] = s.global_written;
  return d;
}

static py::dict attention(const std::string& name, const Array16& q, const Array16& k, const Array16& v,
                          Array16& out, py::array_t<float>& lse, int kv_tokens, float softmax_scale,
                          const std::vector<int32_t>& chunk_ends, int num_sink_tokens, int num_window_tokens,
                          const std::vector<int32_t>& row_kv_tokens, const py::array_t<float>& kv_bias,
                          bool deterministic, int num_sms, int policy, uint32_t seed, int resident) {
  const auto found = variants().find(name);
  if (found == variants().end()) throw py::value_error("no variant named " + name);
  const Variant& variant = found->second;
  rf::sink_window_attention::SinkWindowAttentionParams p{};
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.out = out.mutable_data();
  p.lse = lse.mutable_data();
  p.q_strides = strides_of(q);
  p.k_strides = strides_of(k);
  p.v_strides = strides_of(v);
  p.out_strides = strides_of(out);
  p.batch = static_cast<int>(q.shape(0));
  p.q_tokens = static_cast<int>(q.shape(1));
  p.q_heads = static_cast<int>(q.shape(2));
  p.kv_heads = static_cast<int>(k.shape(2));
  p.head_dim = static_cast<int>(q.shape(3));
  p.kv_tokens = kv_tokens;
  p.dtype = variant.fp16 ? rf::sink_window_attention::AttentionDtype::fp16
                         : rf::sink_window_attention::AttentionDtype::bf16;
  p.softmax_scale = softmax_scale;
  p.num_chunks = static_cast<int>(chunk_ends.size());
  p.chunk_ends = chunk_ends.data();
  p.num_sink_tokens = num_sink_tokens;
  p.num_window_tokens = num_window_tokens;
  const bool rows = !row_kv_tokens.empty(), bias = kv_bias.size() > 0;
  if ((rows || bias) != variant.rows) throw py::value_error("for calls of their kind: the variants _rows");
  p.row_kv_tokens = rows ? row_kv_tokens.data() : nullptr;
  p.kv_bias = bias ? kv_bias.data() : nullptr;
  p.kv_bias_stride = bias ? kv_bias.strides(0) / 4 : 0;
  p.deterministic = deterministic;
  p.num_sms = num_sms;
  if (p.head_dim != variant.head_dim) throw py::value_error("variant of another head_dim");

  std::vector<std::max_align_t> state(variant.state_bytes / sizeof(std::max_align_t) + 1);
  GridShape shape{};
  if (const char* reason = variant.setup(&p, state.data(), &shape)) throw py::value_error(reason);
  // What op.cpp allocates and the launch zeroes; NaN elsewhere.
  std::vector<std::max_align_t> workspace(shape.workspace_bytes / sizeof(std::max_align_t) + 8);
  if (shape.workspace_bytes != 0) {
    char* aligned =
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace.data()) + 127) & ~uintptr_t{127});
    std::memset(aligned, 0xFF, shape.workspace_bytes);
    std::memset(aligned, 0, shape.zeroed_bytes);
    p.workspace = aligned;
    variant.setup(&p, state.data(), &shape);
  }
  chip::LaunchOptions o = options_of(policy, seed, resident);
  o.grid = shape.ctas;
  o.threads = shape.threads;
  o.registers_per_thread = shape.registers_per_thread;
  o.shared_bytes = shape.shared_bytes;
  for (int i = 0; i < shape.num_fields; ++i)
    o.shared_names.push_back(
        {shape.fields[i].name, shape.fields[i].offset, shape.fields[i].bytes, shape.fields[i].count});
  o.global = {buffer_of("q", q), buffer_of("k", k), buffer_of("v", v), buffer_of("out", out),
              buffer_of("lse", lse)};
  if (rows)
    o.global.push_back(
        {"row_kv_tokens", const_cast<int32_t*>(row_kv_tokens.data()), 4 * row_kv_tokens.size()});
  if (bias) o.global.push_back(buffer_of("kv_bias", kv_bias));
  if (p.workspace != nullptr) o.global.push_back({"workspace", p.workspace, shape.workspace_bytes});
  py::dict stats = stats_of(chip::launch(o, [&] { variant.thread(state.data()); }));
  stats["workspace"] = shape.workspace_bytes;
  stats["zeroed"] = shape.zeroed_bytes;
  return stats;
}

// ---- schedule
static rf::TileMap tile_map(int batch_heads, int q_tokens, int kv_tokens, const std::vector<int>& chunk_ends,
                            int num_sink_tokens, int num_window_tokens) {
  rf::TileMap map = rf::TileMap::dense(batch_heads, q_tokens, kv_tokens);
  if (chunk_ends.empty()) return map;
  if (chunk_ends.size() > rf::TileMap::kMaxChunks) throw py::value_error("too many chunks");
  map.chunks = static_cast<int>(chunk_ends.size());
  map.num_sink_tokens = num_sink_tokens;
  map.num_window_tokens = num_window_tokens;
  for (size_t c = 0; c < chunk_ends.size(); ++c) map.chunk_end[c] = chunk_ends[c];
  return map;
}

// The planner's table, walked as the kernel walks it: rows (range, tile, first unit, units, complete) in
// order of execution.
static py::dict schedule(int head_dim, int batch_heads, int q_tokens, int kv_tokens,
                         const std::vector<int>& chunk_ends, int num_sink_tokens, int num_window_tokens,
                         int ctas, bool deterministic) {
  const rf::sink_window_attention::FwdConfig* config = rf::sink_window_attention::fwd_config_sm90(head_dim);
  if (config == nullptr) throw py::value_error("head_dim");
  const rf::TileMap map =
      tile_map(batch_heads, q_tokens, kv_tokens, chunk_ends, num_sink_tokens, num_window_tokens);
  const rf::TileSchedule s = rf::plan_schedule(map, config->tile_m(), config->tile_n,
                                               {.ctas = ctas, .deterministic = deterministic});
  std::vector<int> segments, units, place;
  for (int t = 0; t < map.tiles(config->tile_m()); ++t) {
    const rf::TilePlace at = rf::locate(map, t, config->tile_m());
    units.push_back(map.keys(at.chunk).units(config->tile_n));
    place.insert(place.end(), {at.chunk, at.batch_head, at.row, at.row_end});
  }
  for (int r = 0; r < s.ranges; ++r) {
    rf::Segment g;
    for (rf::SegmentWalk walk(s, r); walk.current(s, g); walk.advance(s)) {
      const int n = units.at(g.tile);
      segments.insert(segments.end(), {r, g.tile, g.first, rf::min_of(g.limit, n) - g.first, g.limit >= n});
    }
  }
  const auto matrix = [](const std::vector<int>& x, py::ssize_t columns) {
    py::array_t<int> a({static_cast<py::ssize_t>(x.size()) / columns, columns});
    std::memcpy(a.mutable_data(), x.data(), x.size() * sizeof(int));
    return a;
  };
  py::dict d;
  d["ranges"] = s.ranges;
  d["whole_tiles"] = s.whole_tiles;
  d["segments"] = matrix(segments, 5);
  d["units"] = py::array_t<int>(static_cast<py::ssize_t>(units.size()), units.data());
  d["place"] = matrix(place, 4);  // chunk, batch * head, first row, end row
  d["tile_m"] = config->tile_m();
  d["tile_n"] = config->tile_n;
  return d;
}

// The cache's answer: where it lies, and whether it equals the planner's.
using rf::sink_window_attention::ScheduleCache;
static std::pair<uintptr_t, bool> cached_schedule(ScheduleCache& cache, int batch_heads, int q_tokens,
                                                  int kv_tokens, const std::vector<int>& chunk_ends, int ctas,
                                                  bool deterministic) {
  const rf::TileMap map = tile_map(batch_heads, q_tokens, kv_tokens, chunk_ends, 0, kv_tokens);
  const rf::ScheduleOptions options{.ctas = ctas, .deterministic = deterministic};
  const auto found = cache.get(map, 128, 176, options);
  const rf::TileSchedule planned = rf::plan_schedule(map, 128, 176, options);
  return {reinterpret_cast<uintptr_t>(found.get()), std::memcmp(found.get(), &planned, sizeof planned) == 0};
}

// Rows (first row, valid rows) of the key tiles that units [first, first + count) visit, as the producer
// visits them.
static std::vector<std::pair<int, int>> visited_keys(int chunk_end, int num_sink_tokens,
                                                     int num_window_tokens, int tile_n, int first,
                                                     int count) {
  const rf::KeyRange range = rf::key_range(chunk_end, num_sink_tokens, num_window_tokens);
  std::vector<std::pair<int, int>> rows;
  for (int interval = 0; interval < 2; ++interval) {
    const rf::KeyRun run = rf::key_run(range, interval, first, count, tile_n);
    for (int i = 0; i < run.count; ++i) rows.push_back({run.row - i * tile_n, i == 0 ? run.valid : tile_n});
  }
  return rows;
}

// ---- probes
static py::dict probe(const std::string& name, const Array16& in, Array16& out, bool fault, int policy,
                      uint32_t seed) {
  chip::LaunchOptions o = options_of(policy, seed, 1 << 20);
  o.global = {buffer_of("in", in), buffer_of("out", out)};
  return stats_of(run_probe(name, in.data(), out.mutable_data(), fault, o));
}

}  // namespace chip_tests

PYBIND11_MODULE(_chip, m) {
  using namespace chip_tests;
  py::register_exception<chip::Fault>(m, "Fault");
  m.def("variants", [] {
    std::vector<std::string> names;
    for (const auto& [name, v] : variants()) names.push_back(name);
    return names;
  });
  m.def("attention", &attention, py::arg("variant"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("out").noconvert(), py::arg("lse").noconvert(), py::kw_only(), py::arg("kv_tokens"),
        py::arg("softmax_scale"), py::arg("chunk_ends"), py::arg("num_sink_tokens"),
        py::arg("num_window_tokens"), py::arg("row_kv_tokens"), py::arg("kv_bias"), py::arg("deterministic"),
        py::arg("num_sms"), py::arg("policy"), py::arg("seed"), py::arg("resident"));
  py::class_<ScheduleCache>(m, "ScheduleCache")
      .def(py::init<>())
      .def("__len__", &ScheduleCache::size)
      .def_property_readonly_static("max_entries", [](py::object) { return ScheduleCache::kMaxEntries; })
      .def("get", &cached_schedule, py::arg("batch_heads"), py::arg("q_tokens"), py::arg("kv_tokens"),
           py::arg("chunk_ends"), py::arg("ctas"), py::arg("deterministic"),
           py::call_guard<py::gil_scoped_release>());
  m.def("schedule", &schedule, py::kw_only(), py::arg("head_dim"), py::arg("batch_heads"),
        py::arg("q_tokens"), py::arg("kv_tokens"), py::arg("chunk_ends") = std::vector<int>{},
        py::arg("num_sink_tokens") = 0, py::arg("num_window_tokens") = 0, py::arg("ctas"),
        py::arg("deterministic") = false);
  m.def("visited_keys", &visited_keys);
  m.def("key_intervals", [](int64_t end, int64_t num_sink_tokens, int64_t num_window_tokens) {
    const rf::KeyIntervals keys = rf::key_intervals(end, num_sink_tokens, num_window_tokens);
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (int i = 0; i < keys.count; ++i) pairs.emplace_back(keys.begin[i], keys.end[i]);
    return pairs;
  });
  m.def("swizzle", &chip::swizzle);
  m.def("exp2_polynomial", py::vectorize(&rf::exp2_polynomial));
  m.def("operand_address", &chip::operand_address);
  m.def("accumulator_coord", [](int t, int i) {
    const chip::FragmentCoord x = chip::accumulator_coord(t, i);
    return std::pair(x.row, x.col);
  });
  m.def("a_operand_coord", [](int t, int j, int h) {
    const chip::FragmentCoord x = chip::a_operand_coord(t, j, h);
    return std::pair(x.row, x.col);
  });
  m.def("operand_desc", &operand_desc);
  m.def("probe", &probe, py::arg("name"), py::arg("input"), py::arg("output").noconvert(),
        py::arg("fault") = false, py::arg("policy") = 0, py::arg("seed") = 0);
}
