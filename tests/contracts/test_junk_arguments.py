"""Whatever is handed to a public function, it answers or raises ArgumentError, and a refused call has changed
nothing."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import rf_kernels as rf
from helpers.refusals import World
from rf_kernels.testing import assert_equal_bits, fingerprint

OPS = (
    "rope_append",
    "rope",
    "ema_evict",
    "sink_window_attention",
    "dmd_gradient",
    "dmd_loss",
    "reward_weight",
)
JUNK = {
    "None": None,
    "object": object(),
    "string": "x",
    "huge": 10**400,
    "negative huge": -(10**400),
    "65 bits": 2**64,
    "fraction": Fraction(47, 10),
    "nan": float("nan"),
    "complex": 1j,
    "bytes": b"1",
    "empty list": [],
    "list of None": [None],
    "dict": {},
    "numpy array": np.array([4.7]),
    "numpy 4.7": np.float32(4.7),
    "numpy bool": np.bool_(True),
    "bool": True,
    "complex tensor": torch.zeros(2, dtype=torch.complex64),
    "empty tensor": torch.zeros(0),
    "tensor 4.7": torch.tensor(4.7),
    "meta": torch.zeros(2, 4, 4, 8, device="meta"),
    "type": torch.Tensor,
}
ARGUMENTS = [(op, name) for op in OPS for name in getattr(World(), op)]


@pytest.mark.parametrize("op, name", ARGUMENTS)
def test_an_answer_or_an_argument_error(op, name):
    for what, junk in JUNK.items():
        world = World()
        call = dict(getattr(world, op)) | {name: junk}
        before = fingerprint(*world.tensors())
        try:
            getattr(rf, op)(**call)
        except rf.ArgumentError as error:
            assert fingerprint(*world.tensors()) == before, what
            assert "argument `" in str(error)
        except Exception as error:
            pytest.fail(f"{name}={what}: {type(error).__name__}: {error}")


NOT_INTEGERS = [
    4.7,
    4.0,
    np.float64(4.7),
    np.float32(4),
    torch.tensor(4.7),
    torch.tensor(4.0),
    Fraction(47, 10),
    "4",
    True,
    np.bool_(True),
    torch.tensor(True),
    torch.tensor([4, 4]),
    None,
    2**63,
]
INTEGERS = {
    ("sink_window_attention", "kv_tokens"): 4,
    ("sink_window_attention", "num_sink_tokens"): 0,
    ("ema_evict", "frame_tokens"): 2,
}


@pytest.mark.parametrize("wrong", NOT_INTEGERS, ids=lambda x: f"{type(x).__name__} {x}")
def test_no_fraction_is_cut_off(wrong):
    def refused(op, name, **change):
        world = World()
        before = fingerprint(*world.tensors())
        with pytest.raises(rf.ArgumentError, match=f"argument `{name}`"):
            getattr(rf, op)(**getattr(world, op) | change)
        assert fingerprint(*world.tensors()) == before

    for op, name in INTEGERS:
        refused(op, name, **{name: wrong})
    for i in range(3):
        for op, name, right in (("rope", "axes", World().rope["axes"]), ("ema_evict", "temporal", (0, 1, 2))):
            refused(op, name, **{name: [*right[:i], wrong, *right[i + 1 :]]})
    q = torch.zeros(1, 4, 1, 8)
    for i, right in enumerate(([2, 4], [2, 4])):
        right[i] = wrong
        with pytest.raises(rf.ArgumentError, match="argument `chunk_ends`"):
            rf.sink_window_attention(q, q, q, chunk_ends=right)
    if wrong is not None:
        for name in ("num_window_tokens", "num_sink_tokens"):
            with pytest.raises(rf.ArgumentError, match=f"argument `{name}`"):
                rf.sink_window_attention(q, q, q, chunk_ends=[4], **{name: wrong})


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, lambda n: torch.tensor([n])])
def test_other_integers_are_integers(kind):
    for (op, name), right in INTEGERS.items():
        first, second = World(), World()
        expected = getattr(rf, op)(**getattr(first, op) | {name: right})
        found = getattr(rf, op)(**getattr(second, op) | {name: kind(right)})
        if expected is not None:
            assert_equal_bits(found, expected)
        assert fingerprint(*second.tensors()) == fingerprint(*first.tensors())


@pytest.mark.parametrize(
    "wrong",
    [
        {"pairs": 3},
        {"pairs": None},
        {"pairs": "211"},
        {"pairs": (2, True, 1)},
        {"bases": 1e4},
        {"bases": (10**400,) * 3},
        {"bases": (1e4, None, 1e4)},
        {"temporal_axis": "x"},
        {"temporal_axis": 0.5},
        {"layout": None},
    ],
    ids=str,
)
def test_wrong_ropes(wrong):
    with pytest.raises(rf.ArgumentError, match=f"RoPE: argument `{next(iter(wrong))}`"):
        rf.RoPE(**{"pairs": (2, 1, 1), "bases": (1e4,) * 3} | wrong)


NEGATIVE = [("rope_append", "k_cache"), ("rope_append", "v_cache")]
NEGATIVE += [
    ("ema_evict", name) for name in ("k_cache", "v_cache", "k_state", "k_state_lo", "v_state", "skipped")
]


@pytest.mark.parametrize("op, name", NEGATIVE)
def test_a_negative_view_is_refused_before_anything_is_written(op, name):
    """The dispatcher would hand the op a copy of it, and find out after the op that it cannot write that
    back."""
    world = World()
    call = getattr(world, op)
    call[name] = torch._neg_view(call[name])
    before = fingerprint(*world.tensors())
    with pytest.raises(rf.ArgumentError, match=f"{op}: argument `{name}`: .*negative bit"):
        getattr(rf, op)(**call)
    assert fingerprint(*world.tensors()) == before


@pytest.mark.parametrize("name", ["q", "k", "v", "angles"])
def test_a_negative_view_is_read_as_its_values(name):
    first, second = World(), World()
    second.rope_append[name] = torch._neg_view(-second.rope_append[name])
    assert_equal_bits(rf.rope_append(**second.rope_append), rf.rope_append(**first.rope_append))
    assert_equal_bits(second.rope_append["k_cache"], first.rope_append["k_cache"])
