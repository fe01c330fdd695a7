"""Wrong calls of ema_evict: one typed error that names the argument, before anything is written."""

import pytest
import torch
from helpers.ema_evict_case import Case, equal

import rf_kernels as rf

int32 = lambda *rows: torch.tensor(rows, dtype=torch.int32)  # noqa: E731
WRONG = {
    "k_cache 3 dims": ("k_cache", lambda c: c.update(k=c["k"][0])),
    "k_cache dtype": ("k_cache", lambda c: c.update(k=c["k"].to(torch.int32), v=c["v"].to(torch.int32))),
    "k_cache strided last": (
        "k_cache",
        lambda c: c.update(k=torch.zeros(2, 35, 3, 32, dtype=torch.bfloat16)[..., ::2]),
    ),
    "k_cache expanded": ("k_cache", lambda c: c.update(k=c["k"][:1].expand(2, -1, -1, -1))),
    "v_cache shape": ("v_cache", lambda c: c.update(v=c["v"][:, :30])),
    "v_cache dtype": ("v_cache", lambda c: c.update(v=c["v"].float())),
    "v_cache is k_cache": ("v_cache", lambda c: c.update(v=c["k"])),
    "frame_tokens 0": ("frame_tokens", lambda c: c.update(frame_tokens=0)),
    "frame_tokens no divisor": ("frame_tokens", lambda c: c.update(frame_tokens=4)),
    "k_state None": ("k_state", lambda c: c.update(k_state=None)),
    "k_state dtype": ("k_state", lambda c: c.update(k_state=c["k_state"].float())),
    "k_state shape": ("k_state", lambda c: c.update(k_state=c["k_state"][:, :5].clone())),
    "k_state strided": ("k_state", lambda c: c.update(k_state=torch.zeros(2, 20, 3, 16).bfloat16()[:, ::2])),
    "k_state in the cache": ("k_state", lambda c: c.update(k_state=c["k"].view(-1)[:960].view(2, 10, 3, 16))),
    "k_state_lo None": ("k_state_lo", lambda c: c.update(k_lo=None)),
    "k_state_lo is k_state": ("k_state_lo", lambda c: c.update(k_lo=c["k_state"])),
    "v_state None": ("v_state", lambda c: c.update(v_state=None)),
    "v_state float32": ("v_state", lambda c: c.update(v_state=c["v_state"].float())),
    "lo beside published": ("k_state_lo", lambda c: c.update(state="published")),
    "v_state beside published": ("v_state", lambda c: c.update(state="published", k_lo=None)),
    "float32 with half state": ("k_state", lambda c: c.update(state="float32")),
    "schedule int64": ("schedule", lambda c: c.update(schedule=c["schedule"].long())),
    "schedule 1 dim": ("schedule", lambda c: c.update(schedule=c["schedule"][0])),
    "schedule too narrow": ("schedule", lambda c: c.update(schedule=c["schedule"][:, :1].contiguous())),
    "schedule batch": ("schedule", lambda c: c.update(schedule=c["schedule"].expand(3, 2, 4).contiguous())),
    "schedule strided": ("schedule", lambda c: c.update(schedule=c["schedule"].t().contiguous().t())),
    "schedule too many sink frames": ("schedule", lambda c: c.update(schedule=torch.zeros(8, 4, dtype=torch.int32))),
    "init 2": ("schedule", lambda c: c.update(schedule=int32([2, 0, 0, 0], [0, 0, 0, 0]))),
    "count > E": ("schedule", lambda c: c.update(schedule=int32([0, 3, 3, 4], [0, 0, 0, 0]))),
    "count < 0": ("schedule", lambda c: c.update(schedule=int32([0, -1, 3, 4], [0, 0, 0, 0]))),
    "source is a sink slot": ("schedule", lambda c: c.update(schedule=int32([0, 1, 1, 0], [0, 0, 0, 0]))),
    "source past the end": ("schedule", lambda c: c.update(schedule=int32([0, 1, 7, 0], [0, 0, 0, 0]))),
    "source negative": ("schedule", lambda c: c.update(schedule=int32([0, 1, -1, 0], [0, 0, 0, 0]))),
    "source twice": ("schedule", lambda c: c.update(schedule=int32([0, 1, 3, 0], [0, 2, 4, 3]))),
    "turns float64": ("turns", lambda c: c.update(turns=c["turns"].double())),
    "turns 3 dims": ("turns", lambda c: c.update(turns=c["turns"][0])),
    "turns sink frames": ("turns", lambda c: c.update(turns=c["turns"][:1])),
    "turns sources": ("turns", lambda c: c.update(turns=c["turns"][:, :2].contiguous())),
    "turns not pairs": ("turns", lambda c: c.update(turns=c["turns"][..., :1].contiguous())),
    "turns batch": ("turns", lambda c: c.update(turns=c["turns"].expand(3, 2, 3, 4, 2).contiguous())),
    "turns strided": ("turns", lambda c: c.update(turns=c["turns"].transpose(2, 3).contiguous().transpose(2, 3))),
    "turns too wide": ("turns", lambda c: c.update(turns=torch.zeros(2, 3, 9, 2))),
    "temporal 2 numbers": ("temporal", lambda c: c.update(temporal=(0, 1))),
    "temporal overlap": ("temporal", lambda c: c.update(temporal=(0, 3, 1))),
    "temporal past the head": ("temporal", lambda c: c.update(temporal=(10, 11, 2))),
    "temporal negative": ("temporal", lambda c: c.update(temporal=(-2, -1, 2))),
    "temporal step 3": ("temporal", lambda c: c.update(temporal=(0, 1, 3))),
    "alpha > 1": ("alpha", lambda c: c.update(alpha=1.5)),
    "alpha NaN": ("alpha", lambda c: c.update(alpha=float("nan"))),
    "alpha tensor > 1": ("alpha", lambda c: c.update(alpha=torch.tensor([0.5, 1.01], dtype=torch.float64))),
    "alpha float32": ("alpha", lambda c: c.update(alpha=torch.tensor(0.5))),
    "alpha shape": ("alpha", lambda c: c.update(alpha=torch.full((3,), 0.5, dtype=torch.float64))),
    "alpha tokens": ("alpha", lambda c: c.update(alpha=torch.full((2, 4), 0.5, dtype=torch.float64))),
    "state name": ("state", lambda c: c.update(state="exact")),
    "on_nonfinite name": ("on_nonfinite", lambda c: c.update(on_nonfinite="raise")),
    "skipped int32": ("skipped", lambda c: c.update(skipped=torch.zeros(1, dtype=torch.int32))),
    "skipped two": ("skipped", lambda c: c.update(skipped=torch.zeros(2, dtype=torch.int64))),
    "device": ("v_cache", lambda c: c.update(v=c["v"].to("meta"))),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_change_nothing(name):
    argument, spoil = WRONG[name]
    case = Case(torch.bfloat16, "compensated")
    call = {**vars(case), **case.options}
    spoil(call)
    written = [t for t in (*case.tensors, case.skipped) if t is not None]
    before = [t.clone() for t in written]
    options = {key: call[key] for key in case.options} | {"on_nonfinite": call.get("on_nonfinite", "skip")}
    with pytest.raises(rf.ArgumentError, match=rf"rf_kernels\.ema_evict: argument `{argument}`: expected .*, found .*"):
        rf.ema_evict(*(call[key] for key in ("k", "v", "k_state", "k_lo", "v_state")), **options)
    equal(written, before)


def test_a_count_above_the_sources_is_refused_wherever_it_would_read():
    """The entry behind the first sample's sources is the second sample's init, which would pass for a source."""
    case = Case(torch.float32, "published", schedule=[[[0, 2, 2]], [[1, 0, 0]]], window=3)
    with pytest.raises(rf.ArgumentError, match="count of sink frame 0"):
        case.run()
