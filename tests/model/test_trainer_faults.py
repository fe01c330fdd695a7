"""What can go wrong in a training run: one clear error each, and nothing lost."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rf_kernels as rf
from helpers.training import DISTILL, ENVIRONMENT, TEACHER, WORLD, torchrun
from reward_forcing import rewards
from reward_forcing.checkpoint import CheckpointError
from reward_forcing.models import BidirectionalWanModel
from reward_forcing.trainer import checkpoint, loop, stages, train
from reward_forcing.trainer.data import WorldSource, read_prompts
from reward_forcing.trainer.draws import Draws
from reward_forcing.trainer.step import StoppedOnNonFinite

MODEL = (
    "{dim: 32, ffn_dim: 64, num_heads: 2, num_layers: 1, in_dim: 8, out_dim: 8, text_dim: 32, text_len: 3}"
)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").open()]


def names(out):
    return sorted(path.name for path in out.glob("*-*"))


# ---- what is not finite ------------------------------------------------------------------------------------
class Poison:
    """Makes one kind of number NaN or infinite, in the calls that ``when`` says."""

    def __init__(self, monkeypatch, kind: str, bad: float):
        self.on, predict, score = False, stages.predict_flow, rewards.scores
        if kind == "prediction":

            def poisoned(*arguments):
                flow = predict(*arguments)
                return flow.index_fill(0, torch.tensor([0]), bad) if self.on else flow

            monkeypatch.setattr(stages, "predict_flow", poisoned)
        elif kind == "reward":

            def poisoned_scores(*arguments):
                given = score(*arguments)
                return torch.full_like(given, bad) if self.on else given

            monkeypatch.setattr(rewards, "scores", poisoned_scores)
        else:
            module, name = stages.losses.dmd, "critic_flow_loss"
            loss = module.critic_flow_loss
            monkeypatch.setattr(module, name, lambda *a, **k: loss(*a, **k) * (bad if self.on else 1))


@pytest.mark.parametrize(
    ("kind", "bad"),
    [("prediction", math.nan), ("prediction", math.inf), ("reward", math.nan), ("reward", math.inf)]
    + [("loss", math.nan)],
)
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(kind, bad, tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    poison = Poison(monkeypatch, kind, bad)
    config = replace(DISTILL, steps=4, distill=replace(DISTILL.distill, critic_steps=1))
    seen = []
    step = loop.DistillStage.step

    def watched(self, number):
        poison.on = number in (1, 2)
        models = {name: trained.model for name, trained in self.networks.items()}
        before = {name: [p.detach().clone() for p in m.parameters()] for name, m in models.items()}
        figures = step(self, number)
        seen.append({n: all(map(torch.equal, before[n], m.parameters())) for n, m in models.items()})
        return figures

    monkeypatch.setattr(loop.DistillStage, "step", watched)
    train(config, tmp_path)
    hit = {"prediction": ("generator", "critic"), "reward": ("generator",), "loss": ("critic",)}[kind]
    lines = log(tmp_path)
    for name in ("generator", "critic"):
        counts = [line.get(f"{name}_skipped") for line in lines]
        assert counts == ([None, 1, 2, None] if name in hit else [None] * 4), (name, lines)
        assert [same[name] for same in seen] == [count is not None for count in counts]


def test_three_in_a_row_stop_the_run_with_its_state_saved(tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    poison, step = Poison(monkeypatch, "reward", float("nan")), loop.DistillStage.step

    def poisoned(self, number):
        poison.on = number >= 1
        return step(self, number)

    monkeypatch.setattr(loop.DistillStage, "step", poisoned)
    config = replace(DISTILL, steps=6, distill=replace(DISTILL.distill, critic_steps=1))
    with pytest.raises(StoppedOnNonFinite, match="third in a row"):
        train(config, tmp_path)
    assert names(tmp_path) == ["step-00000003"] and "third in a row" in log(tmp_path)[-1]["stopped"]
    monkeypatch.setattr(loop.DistillStage, "step", step)
    poison.on = False
    train(config, tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]


ONE_RANK = """
    import resource, sys
    import torch, torch.distributed as dist
    from dataclasses import replace
    from pathlib import Path
    from reward_forcing import rewards
    from reward_forcing.trainer import checkpoint, load, loop, stages, train
    from reward_forcing.trainer.distributed import process_group

    now, who = [0], [0]
    predict, step, score = stages.predict_flow, loop.DistillStage.step, rewards.scores
    dmd = stages.losses.dmd
    flow_loss = dmd.critic_flow_loss

    def hit(number, rank):
        return now[0] == number and dist.get_rank() == rank

    stages.predict_flow = lambda *a: predict(*a) * (float("nan") if hit(1, 1) else 1)
    rewards.scores = lambda *a: score(*a) * (float("inf") if hit(2, 0) else 1)
    dmd.critic_flow_loss = lambda *a, **k: flow_loss(*a, **k) * (float("nan") if hit(3, 1) else 1)

    def watched(self, number):
        now[0] = number
        figures = step(self, number)
        figures = {k: v for k, v in figures.items() if k.endswith("skipped")}
        sys.stdout.write(f"rank {dist.get_rank()} step {number} {figures}\\n")  # one write: ranks share it
        sys.stdout.flush()
        return figures

    loop.DistillStage.step = watched
    with process_group():
        config, out = load(sys.argv[1]), Path(sys.argv[2])
        train(config, out)
        config = replace(config, steps=6)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:  # its disk is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            train(config, out)
        except OSError as error:
            sys.stdout.write(f"rank {dist.get_rank()} ends: {error}; {checkpoint.newest(out).name}\\n")
            sys.stdout.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        train(config, out)
"""


@pytest.mark.heavy
def test_not_finite_or_a_full_disk_on_one_rank_alone(tmp_path):
    """A prediction on rank 1, a reward on rank 0, a loss on rank 1: both ranks skip the same steps. Then rank
    1 cannot write its part of a checkpoint: both end, the older one is whole, and the run goes on from it."""
    pytest.importorskip("cv2")
    script, config = tmp_path / "script.py", tmp_path / "run.yaml"
    script.write_text(textwrap.dedent(ONE_RANK))
    config.write_text(
        f"stage: distill\nmodel: {MODEL}\n"
        "frames: 6\nbatch: 2\nsteps: 5\n"
        "stream: {local_attn_size: 6, alpha: 0.9, shift: 2.0, denoising_step_list: [1000, 500]}\n"
        "distill: {objective: re_dmd, critic_steps: 1}\n"
    )
    command = torchrun(str(script), str(config), str(tmp_path / "out"))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    both = {"critic_skipped": 1, "generator_skipped": 1}
    expected = [{}, both, {"generator_skipped": 2}, {"critic_skipped": 2}, {}]
    for rank in (0, 1):
        for number, figures in enumerate(expected):
            assert f"rank {rank} step {number} {figures}" in done.stdout, done.stdout
        ended = rf"rank {rank} ends: checkpoint step-00000006 was not written: .*; step-00000005"
        assert re.search(ended, done.stdout), done.stdout
        assert done.stdout.count(f"rank {rank} step 5 {{}}") == 2  # once more, from the older checkpoint
    assert "File too large" in done.stdout and names(tmp_path / "out") == ["step-00000005", "step-00000006"]


# ---- saving ------------------------------------------------------------------------------------------------
@contextmanager
def files_of_at_most(count):
    """Writes beyond so many bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


STATE = {"step": 1, "weights": {"a": torch.arange(4000.0), "b": torch.ones(3, 5)}, "count": 7}


def fresh():
    return {"step": 0, "weights": {"a": torch.zeros(4000), "b": torch.zeros(3, 5)}, "count": 0}


def assert_loads(path, step):
    state = fresh()
    checkpoint.load(state, path)
    assert state["step"] == step and torch.equal(state["weights"]["a"], STATE["weights"]["a"])


@pytest.mark.parametrize("count", [0, 40, 1000, 15000, 17000])
def test_a_full_disk_leaves_the_last_checkpoint(count, tmp_path):
    checkpoint.save(STATE, tmp_path, 1)
    with files_of_at_most(count), pytest.raises(OSError, match="2 was not written: .*File too large"):
        checkpoint.save(STATE | {"step": 2}, tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]
    assert_loads(checkpoint.newest(tmp_path), 1)
    checkpoint.save(STATE | {"step": 2}, tmp_path, 2)
    assert_loads(checkpoint.newest(tmp_path), 2)


def test_a_full_disk_ends_a_run_in_one_error_and_the_run_goes_on(tmp_path):
    config = replace(TEACHER, steps=2, save_every=1)
    whole = load_file(train(config, tmp_path / "whole"))
    train(replace(config, steps=1), tmp_path / "run")
    for count, text in ((1, "File too large"), (100_000, "step-00000002 was not written")):
        with files_of_at_most(count), pytest.raises(OSError, match=text):
            train(config, tmp_path / "run")
        assert checkpoint.newest(tmp_path / "run").name == "step-00000001"
    parts = load_file(train(config, tmp_path / "run"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


KILLED = """
    import os, resource, signal, sys, warnings
    from pathlib import Path
    import torch
    from reward_forcing.trainer import checkpoint
    warnings.simplefilter("ignore")
    STATE = {"step": 1, "weights": {"a": torch.arange(4000.0), "b": torch.ones(3, 5)}, "count": 7}
    out = Path(sys.argv[1])
    checkpoint.save(STATE, out, 1)

    def child(action, step=2):
        if os.fork() == 0:
            action()
            checkpoint.save(STATE | {"step": step}, out, step)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.wait()[1])

    def limited(count):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process at that byte of a file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))

    size = max(path.stat().st_size for path in (out / "step-00000001").iterdir())
    for count in [*range(0, size, max(1, size // 40)), size - 1]:
        code = child(lambda: limited(count))
        print(count, code, checkpoint.newest(out).name)

    def before(count):  # killed before the count-th change of a name
        def counted(function):
            def run(*arguments, **options):
                seen.append(function)
                if len(seen) > count:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)
            return run
        seen = []
        for name in ("rename", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))

    for step in (2, 2, 4):  # a new one, the same once more, and one that drops the oldest
        for count in range(100):
            code = child(lambda: before(count), step)
            state = {"step": 0, "count": 0, "weights": {n: 0 * t for n, t in STATE["weights"].items()}}
            checkpoint.load(state, checkpoint.newest(out))
            print("name", code, state["step"], state["count"])
            if code == 0:
                break
"""


@pytest.mark.heavy
def test_killed_at_any_byte_of_a_save(tmp_path):
    """The process ends at chosen bytes of the files, and before each change of a name: what is found
    afterwards is a whole checkpoint, never an older one than before."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, str(script), str(tmp_path / "out")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    bytes_, renames = [x for x in lines if x[0] != "name"], [x for x in lines if x[0] == "name"]
    assert len(bytes_) > 40 and all(x[1:] == ["-25", "step-00000001"] for x in bytes_), bytes_
    assert [x[1] for x in renames].count("0") == 3 and len(renames) > 20, renames
    steps = [int(x[2]) for x in renames]
    assert steps == sorted(steps) and {*steps} == {1, 2, 4} and all(x[3] == "7" for x in renames)


def test_half_a_line_of_the_log_is_dropped(tmp_path):
    config = replace(TEACHER, steps=2, save_every=1)
    train(replace(config, steps=1), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "sec')
    train(config, tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [1, 2]


@pytest.mark.heavy
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_it_goes_on(victim, tmp_path):
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    text = f"stage: teacher\nframes: 4\nbatch: 4\nsave_every: 2\nmodel: {MODEL}\nsteps: "
    config.write_text(f"{text}100000\n")
    command = torchrun("-m", "reward_forcing.trainer", str(config), str(out))
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as launch:
        try:
            deadline = time.monotonic() + 120
            while not (out / "step-00000002").exists():
                assert launch.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            children = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
            ranks = {_rank_of(child): int(child) for child in children}
            os.kill(ranks[victim], signal.SIGKILL)
            _, errors = launch.communicate(timeout=60)
        finally:
            launch.kill()
    assert launch.returncode == 1 and f"rank      : {victim} " in errors and "(SIGKILL)" in errors, errors
    own = [line for line in errors.splitlines() if line.startswith("reward-forcing: error")]
    assert len(own) <= 1 and all("another rank is gone; the same command goes on" in line for line in own)
    assert "reward_forcing/trainer/loop.py" not in errors  # no trace of calls besides torchrun's own

    last = checkpoint.newest(out)
    step = int(last.name[5:])
    config.write_text(f"{text}{step + 1}\n")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in log(out)] == list(range(1, step + 2))


def _rank_of(process: str) -> int:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next(int(value[5:]) for value in variables if value.startswith(b"RANK="))


# ---- bad input ---------------------------------------------------------------------------------------------
def test_another_architectures_checkpoint_is_refused_with_its_names(tmp_path):
    train(replace(TEACHER, steps=1), tmp_path / "run")
    deeper = replace(WORLD, num_layers=3)
    with pytest.raises(rf.ArgumentError, match=r"missing: .*blocks\.2\..*and \d+ more"):
        train(replace(TEACHER, model=deeper), tmp_path / "run")
    with pytest.raises(rf.ArgumentError, match=r"unexpected: .*blocks\.1\."):  # the library would ignore them
        train(replace(TEACHER, model=replace(WORLD, num_layers=1)), tmp_path / "run")
    with pytest.raises(rf.ArgumentError, match=r"shape: .*ffn.*\(64,\), expected \(96,\)"):
        train(replace(TEACHER, model=replace(WORLD, ffn_dim=96)), tmp_path / "run")
    path = tmp_path / "other.safetensors"
    save_file(BidirectionalWanModel(deeper).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.2\."):
        train(replace(TEACHER, teacher=str(path)), tmp_path / "start")
    assert not names(tmp_path / "start")


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "sums-0.json"])
@pytest.mark.parametrize("damage", ["short", "bit", "gone"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_serves(file, damage, tmp_path):
    checkpoint.save(STATE, tmp_path, 1)
    path = checkpoint.save(STATE | {"step": 2}, tmp_path, 2)
    data = bytearray((path / file).read_bytes())
    if damage == "gone":
        (path / file).unlink()
    else:
        data[len(data) // 2] ^= 1
        (path / file).write_bytes(data[: len(data) // 2] if damage == "short" else data)
    state = fresh()
    with pytest.raises(rf.ArgumentError, match="a whole checkpoint.*remove step-00000002") as refused:
        checkpoint.load(state, checkpoint.newest(tmp_path))
    assert len(str(refused.value).splitlines()) == 1
    assert state["step"] == 0 and not state["weights"]["a"].any()
    for left in path.iterdir():
        left.unlink()
    path.rmdir()
    assert_loads(checkpoint.newest(tmp_path), 1)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_a_cut_file_of_weights_is_refused(size, tmp_path):
    path = tmp_path / "start.safetensors"
    save_file(BidirectionalWanModel(WORLD).state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="start.safetensors: not a readable safetensors file"):
        train(replace(TEACHER, teacher=str(path)), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "one prompt a line, found no prompt in"),
        (b"\n  \n", "found no prompt in"),
        (b"slow red disc\nslow plaid disc\n", "line 2: .*plaid"),
        (b"\xff\xfe\x00", "a text file"),
        (None, "a text file"),
    ],
)
def test_a_file_of_prompts_is_refused(content, text, tmp_path):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(rf.ArgumentError, match=text):
        train(replace(TEACHER, prompts=str(path)), tmp_path / "out")


def test_a_file_of_prompts_is_what_a_run_draws_from(tmp_path):
    (tmp_path / "prompts.txt").write_text("slow red disc\n\na fast blue ring\n")
    source = WorldSource(Draws(0), read_prompts(str(tmp_path / "prompts.txt")))
    assert {*source.prompts(0, range(20))} == {"slow red disc", "fast blue ring"}


def test_wrong_shapes_from_a_source_are_refused(tmp_path):
    class Wrong(WorldSource):
        def clips(self, step, samples, frames):
            clips, prompts = super().clips(step, samples, frames)
            return clips[:, :, :5], prompts

    with pytest.raises(rf.ArgumentError, match=r"argument `x`: expected \[B, 8, F, H, W\], found \(4, 5, "):
        train(TEACHER, tmp_path, source=Wrong(Draws(0)))


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(2, 1), None])
def test_a_reward_that_returns_the_wrong_number_of_scores_ends_the_run(scores, tmp_path, monkeypatch):
    class Reward:
        def __call__(self, frames, prompts):
            return scores

    monkeypatch.setattr(rewards, "OpticalFlowDynamics", Reward)
    with pytest.raises(rf.ArgumentError, match=r"Reward: argument `scores`: expected one per sample, \(2,\)"):
        train(DISTILL, tmp_path)
