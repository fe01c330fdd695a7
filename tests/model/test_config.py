"""Configurations refuse what cannot be, wherever it came from: the message names the key, what was expected
and what was found."""

import dataclasses

import numpy as np
import pytest

import rf_kernels as rf
from reward_forcing import FlowMatchScheduler, ModelConfig, StreamConfig

SIZES = {"dim": 48, "ffn_dim": 80, "num_heads": 2, "num_layers": 2}

REFUSED = [
    (ModelConfig, {"dim": 0}, "`dim`: expected at least 1, found 0"),
    (ModelConfig, {"dim": 48.0}, "`dim`: expected an integer, found 48.0"),
    (ModelConfig, {"dim": None}, "`dim`: expected an integer, found None"),
    (ModelConfig, {"num_layers": True}, "`num_layers`: expected an integer, found True"),
    (ModelConfig, {"num_heads": "2"}, "`num_heads`: expected an integer, found '2'"),
    (ModelConfig, {"num_heads": 7}, "`num_heads`: expected heads of an even width (dim = 48), found 7"),
    (ModelConfig, {"freq_dim": 3}, "`freq_dim`: expected an even number, found 3"),
    (ModelConfig, {"text_len": -1}, "`text_len`: expected at least 1, found -1"),
    (ModelConfig, {"eps": 0.0}, "`eps`: expected a positive number, found 0.0"),
    (ModelConfig, {"eps": float("nan")}, "`eps`: expected a finite number, found nan"),
    (ModelConfig, {"qk_norm": 1}, "`qk_norm`: expected True or False, found 1"),
    (ModelConfig, {"patch_size": 2}, "`patch_size`: expected a tuple of integers, found 2"),
    (
        ModelConfig,
        {"patch_size": (1, 2.0, 2)},
        "`patch_size`: expected a tuple of integers, found (1, 2.0, 2)",
    ),
    (ModelConfig, {"patch_size": (2, 2, 2)}, "`patch_size`: expected (1, rows, columns), found (2, 2, 2)"),
    (ModelConfig, {"model_type": "i2v"}, "`model_type`: expected 't2v', found 'i2v'"),
    (StreamConfig, {"chunk_frames": 0}, "`chunk_frames`: expected at least 1, found 0"),
    (StreamConfig, {"chunk_frames": 2.5}, "`chunk_frames`: expected an integer, found 2.5"),
    (StreamConfig, {"sink_frames": -1}, "`sink_frames`: expected at least 0, found -1"),
    (StreamConfig, {"sink_frames": 9}, "`local_attn_size`: expected at least 10, with 9 sink frames"),
    (
        StreamConfig,
        {"sink_policy": "static", "sink_frames": 10},
        "`local_attn_size`: expected at least 10, with 10",
    ),
    (StreamConfig, {"sink_policy": "none"}, "`sink_frames`: expected 0 with sink_policy 'none', found 3"),
    (StreamConfig, {"sink_policy": "mean"}, "`sink_policy`: expected one of none, static, ema"),
    (StreamConfig, {"sink_state": 32}, "`sink_state`: expected a string, found 32"),
    (
        StreamConfig,
        {"sink_state": "int4"},
        "`sink_state`: expected one of ('compensated', 'float32', 'published')",
    ),
    (StreamConfig, {"alpha": 1.5}, "`alpha`: expected a number in 0..1, found 1.5"),
    (StreamConfig, {"alpha": "0.9"}, "`alpha`: expected a finite number, found '0.9'"),
    (
        StreamConfig,
        {"denoising_step_list": ()},
        "`denoising_step_list`: expected at least one step, found none",
    ),
    (
        StreamConfig,
        {"denoising_step_list": (1000, -1)},
        "`denoising_step_list`: expected steps of at least 0, found -1",
    ),
    (
        StreamConfig,
        {"denoising_step_list": (1000, "500")},
        "`denoising_step_list`: expected a tuple of integers",
    ),
    (StreamConfig, {"shift": float("inf")}, "`shift`: expected a finite number, found inf"),
    (StreamConfig, {"shift": 0}, "`shift`: expected a positive number, found 0"),
    (StreamConfig, {"context_noise": -1.0}, "`context_noise`: expected at least 0, found -1.0"),
    (StreamConfig, {"warp": "no"}, "`warp`: expected True or False, found 'no'"),
]


@pytest.mark.parametrize(
    "cls, change, words", REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_a_wrong_value_is_refused_by_name(cls, change, words):
    values = {**(SIZES if cls is ModelConfig else {}), **change}
    for make in (lambda: cls(**values), lambda: cls.from_dict({**values, "a key of another program": 1})):
        with pytest.raises(rf.ArgumentError) as refused:
            make()
        assert str(refused.value).startswith(f"{cls.__name__}: argument {words}")


def test_a_mapping_without_a_size_names_it():
    with pytest.raises(
        rf.ArgumentError, match=r"argument `ffn_dim`: expected a value, found none among the keys \['dim'\]"
    ):
        ModelConfig.from_dict({"dim": 48})
    with pytest.raises(
        rf.ArgumentError, match="argument `values`: expected a mapping of names to values, found list"
    ):
        StreamConfig.from_dict(["chunk_frames"])


def test_what_is_read_from_files_is_taken():
    read = {**SIZES, "patch_size": [1, 1, 3], "eps": 1, "dim": np.int64(48)}
    assert ModelConfig.from_dict(read) == ModelConfig(**SIZES, patch_size=(1, 1, 3), eps=1.0)
    assert StreamConfig.from_dict({"denoising_step_list": [1000, 500]}).denoising_step_list == (1000, 500)
    assert StreamConfig.from_dict(dataclasses.asdict(StreamConfig())) == StreamConfig()


@pytest.mark.parametrize("shift", [0.0, -1.0, float("inf"), float("nan")])
def test_a_schedule_needs_a_finite_shift(shift):
    with pytest.raises(rf.ArgumentError, match="argument `shift`: expected a positive finite number"):
        FlowMatchScheduler(shift)


def test_an_average_is_told_by_one_field_however_it_is_written():
    """Whoever asks a configuration for `ema` and `alpha` finds them."""
    for text in ("ema:0.9", "ema:alpha=0.9", "ema:alpha=0.9,state=published"):
        state = "published" if "published" in text else "compensated"
        told = StreamConfig(sink_policy=text)
        assert told == StreamConfig(alpha=0.9, sink_state=state) and told.policy() == rf.EMASink(0.9, state)
    for text in ("ema:held=0", "steady", "ema:alpha=0.9/0.8/0.7"):
        assert StreamConfig(sink_policy=text).sink_policy == text
    assert StreamConfig(sink_policy="ema:0.9", sink_frames=0).policy() == rf.NoSink()
    with pytest.raises(rf.ArgumentError, match="at least 10, with 9 sink frames"):
        StreamConfig(sink_policy="ema:0.9", sink_frames=9)
