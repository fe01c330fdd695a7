"""rope_append and rope: oracle against the golden set and an independent formula, op against oracle, contract, PyTorch
citizenship."""

import pytest
import torch
from golden_cases import parametrize

import rf_kernels as rf
from rf_kernels.reference import rope_append as ref

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["adjacent", "half", "axis_half"]


# ---- golden set ------------------------------------------------------------------------------------------------------


def golden_run(case, run):
    """(x, angles, axes, layout-free rope) of one run of a golden rope case; pad tokens are cut off (they pass
    through)."""
    hyper = case.hyper["runs"][run]
    frames, rows, columns = hyper["grid"]
    wan = rf.RoPE3D.wan(hyper["head_dim"], base=case.hyper["theta"])
    assert list(wan.pairs) == hyper["pairs_t_h_w"]
    start = hyper["start_frame"]
    positions = [range(start, start + frames), range(rows), range(columns)]
    return wan, positions, frames * rows * columns


@parametrize("rope")
@pytest.mark.parametrize("path", [ref.rope, rf.rope], ids=["oracle", "op"])
def test_golden(case, path):
    for run in range(len(case.hyper["runs"])):
        rope, positions, tokens = golden_run(case, run)
        x = case.tensors[f"r{run}.x"]
        for dtype, golden in ((torch.float64, f"r{run}.y"), (torch.float32, f"r{run}.y")):
            angles, axes = rope.table(positions, dtype=dtype)
            y = path(x[:, :tokens].to(dtype), angles=angles, axes=axes)
            case.tolerance(dtype).check(y, case.tensors[golden][:, :tokens].to(dtype), f"{case.name}: {golden}")


@parametrize("rope")
def test_golden_bfloat16_equals_the_published_rounding(case):
    """The published path rotates bf16 in float64 and rounds once; so do we, in float32: at most the last bit differs,
    seldom."""
    for run in range(len(case.hyper["runs"])):
        rope, positions, tokens = golden_run(case, run)
        x = case.tensors[f"r{run}.x"][:, :tokens].to(torch.bfloat16)
        angles, axes = rope.table(positions, dtype=torch.bfloat16)
        y, expected = rf.rope(x, angles=angles, axes=axes), case.tensors[f"r{run}.y_bf16"][:, :tokens]
        assert (y != expected).float().mean() < 2e-3
        # One unit in the last place of bf16 is 2^-7 of the value's power of two.
        torch.testing.assert_close(y.double(), expected.double(), rtol=2**-7, atol=1e-6)
