"""The variants of the Hopper attention kernel that are kept for tuning (benchmarks/tuning): each computes
attention on the functional model, and the stage that times them passes tensors as their C interface wants
them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_suite import tuning
from benchmarks.gpu_suite.report import read_rows
from benchmarks.tuning import triton_configs
from chip.faults import FAULTS
from chip.harness import POLICIES, Case, check, make_inputs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "tuning"))
import build_variants  # noqa: E402
import source_edits  # noqa: E402
import variants  # noqa: E402

ON_MODEL = [v.name for v in variants.VARIANTS if v.on_model and v.edits]


def test_every_edit_is_found_and_every_name_is_its_own():
    for variant in variants.VARIANTS:
        for file, pairs in variant.edits.items():
            assert source_edits.edited(ROOT, file, pairs, variant.name) != (ROOT / file).read_text()
    names = [v.name for v in variants.VARIANTS] + [f.name for f in FAULTS]
    assert len(set(names)) == len(names)
    with pytest.raises(SystemExit, match="stale: 'no such text' occurs 0 times in Makefile"):
        source_edits.edited(ROOT, "Makefile", (("no such text", ""),), "stale")


def test_the_document_tells_of_every_variant():
    text = (ROOT / "docs" / "tuning.md").read_text()
    assert [v.name for v in variants.VARIANTS if f"`{v.name}`" not in text] == []


@pytest.mark.heavy
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ON_MODEL)
def test_variant_on_the_model(name, policy):
    """Split tiles, odd edges, two intervals of keys."""
    check(make_inputs(Case(200, 611, heads=2, num_sms=4)), policy=policy, variant=name)
    check(make_inputs(Case(70, 1409, num_sms=5)), policy=policy, variant=name)
    whole = Case(500, 500, chunk_ends=(250, 500), num_sink_tokens=70, num_window_tokens=120, num_sms=5)
    check(make_inputs(whole), policy=policy, variant=name)


NAIVE = """
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
static float widen(uint16_t x) { uint32_t u = uint32_t(x) << 16; float f; std::memcpy(&f, &u, 4); return f; }
static uint16_t narrow(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
extern "C" int64_t rf_variant_workspace_bytes(int sms) { return 64 * sms; }
extern "C" int rf_variant_forward(const void* q_, const void* k_, const void* v_, void* out_, float* lse,
                                  const int64_t* s, const int32_t* n, float scale, void* workspace, void*) {
  auto q = (const uint16_t*)q_, k = (const uint16_t*)k_, v = (const uint16_t*)v_;
  auto out = (uint16_t*)out_;
  if (*(const char*)workspace != 0 || n[6] || n[7] != 1) return 1;
  for (int b = 0; b < n[0]; ++b)
    for (int h = 0; h < n[2]; ++h)
      for (int i = 0; i < n[1]; ++i) {
        const int g = h / (n[2] / n[3]), dim = n[4], keys = n[5];
        std::vector<double> o(dim), w(keys);
        double sum = 0;
        for (int j = 0; j < keys; ++j) {
          double x = 0;
          for (int d = 0; d < dim; ++d)
            x += widen(q[b * s[0] + i * s[1] + h * s[2] + d]) * widen(k[b * s[3] + j * s[4] + g * s[5] + d]);
          sum += w[j] = std::exp(SIGN x * scale);
        }
        for (int j = 0; j < keys; ++j)
          for (int d = 0; d < dim; ++d) o[d] += w[j] / sum * widen(v[b * s[6] + j * s[7] + g * s[8] + d]);
        for (int d = 0; d < dim; ++d) out[b * s[9] + i * s[10] + h * s[11] + d] = narrow(o[d]);
        lse[(b * n[2] + h) * n[1] + i] = std::log(sum);
      }
  return 0;
}
"""


@pytest.fixture
def folder(tmp_path):
    """Two variants for the host: plain attention, and one with the sign of its scores turned."""
    for name, sign in (("right", ""), ("wrong", "-")):
        source = tmp_path / f"{name}.cpp"
        source.write_text(NAIVE.replace("SIGN", sign))
        subprocess.run(["g++", "-O1", "-shared", "-fPIC", source, "-o", tmp_path / f"{name}.so"], check=True)
    return tmp_path


def stage(folder, rows):
    tuning.main([str(folder), "--device", "cpu", "--rows", str(rows), "--seconds", "0.001", "--tiny"])
    return read_rows(rows)


def test_the_stage_times_what_is_right_and_names_what_is_wrong(folder):
    (row,) = stage(folder, folder / "rows.jsonl")
    assert set(row["timings"]) == {"sink_window_attention", "right"}
    assert "differs from the float64 result" in row["left_out"]["wrong"]


def test_the_stage_without_variants_says_so(tmp_path):
    (row,) = stage(tmp_path, tmp_path / "rows.jsonl")
    assert row["kind"] == "note" and "make tuning" in row["text"]


def test_grouped_heads_and_strides(folder):
    torch.manual_seed(0)
    q, cache = torch.randn(2, 5, 4, 64).bfloat16(), torch.randn(2, 2, 9, 2, 64).bfloat16()
    k, v = cache[:, 0, 1:8], cache[:, 1, 1:8]
    k_all, v_all = (t.double().repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double().transpose(1, 2), k_all, v_all)
    found = tuning.loaded(folder)["right"](q, k, v)()
    assert float((found.double() - expected.transpose(1, 2)).abs().max()) < 2**-8 * float(v.abs().max())


def test_without_a_build_of_the_kernels_the_command_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(build_variants, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="make ext"):
        build_variants.own_command()


def test_triton_is_tuned_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="tuning: (no GPU|triton is not installed)"):
        triton_configs.main([])
