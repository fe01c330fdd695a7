"""The library's training rollout against the published one, its caches cut from the graph (``gd``)."""

import pytest

from helpers.golden_cases import as_dtype, parametrize
from reward_forcing.config import ModelConfig, StreamConfig
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline
from reward_forcing.trainer import Rollout


@parametrize("training_rollout")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("how", ["graph", "replay"])
def test_training_rollout(case, dtype, how):
    """A published training cache outlasts its window and never evicts: that is a static sink, re-phased."""
    hyper, tensors, run_dtype = case.hyper, case.tensors, as_dtype(dtype)
    model = CausalWanModel(ModelConfig.from_dict(hyper))
    model.load_state_dict(case.weights(), strict=True)
    pipeline = StreamingPipeline(
        model.to(run_dtype), StreamConfig.from_dict({**hyper, "sink_policy": "static"})
    )
    rollout = Rollout(pipeline, renoise_context=True)
    draws = iter(tensors["renoise"].to(run_dtype))

    def source(purpose, chunk, like):
        return next(draws).reshape(like.shape)

    noise, context = tensors["noise"].to(run_dtype), tensors["context"].to(run_dtype)
    exits = [hyper["exit_index"]] * (hyper["frames"] // hyper["chunk_frames"])
    tape = rollout.generate(noise, context, exits, source)
    assert next(draws, None) is None, "every saved draw must be consumed"
    case.check(dtype, "out", tape.x, "out_f64")

    golden = tensors.below("gd.")
    if not golden:
        return  # recorded with the leak through the caches alone
    weights = tensors["loss_weights"].to(run_dtype)
    if how == "replay":
        rollout.replay(tape, context, weights)
    else:
        (rollout.graph(tape, context) * weights).sum().backward()
    bound = case.tolerance(dtype, "gradients")
    for name, expected in golden.items():
        bound.check(model.get_parameter(name).grad, expected, name)
