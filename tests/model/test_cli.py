"""`reward-forcing stream`: what it refuses, in which words, and that a stream which was stopped anywhere goes
on to the same latents."""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rf_kernels as rf
from reward_forcing import job
from reward_forcing.cli import main
from reward_forcing.folder import OUTPUTS, StreamFolder

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = str(ROOT / "tests/golden/model_weights.safetensors")
SMALL = [
    "stream",
    "--checkpoint",
    CHECKPOINT,
    "--heads",
    "2",
    "--height",
    "4",
    "--width",
    "6",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--steps",
    "1000",
    "500",
]


@pytest.fixture(autouse=True, scope="module")
def on_one_thread(threads_of_module):
    """Tensors are tiny here, and a subprocess has to compute with as many threads as this process."""
    threads_of_module(1)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def call(capsys, *arguments) -> tuple[int, str]:
    """Exit code and stderr of a call in this process."""
    try:
        code = main([*SMALL, *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run of 15 frames leaves when nobody stops it: the window is full after nine."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([*SMALL, "--frames", "15", "--out", str(folder)]) == 0
    return files(folder)


# ---- refusals ----------------------------------------------------------------------------------------------

REFUSED = {
    "no frames": (["--frames", "0"], "--frames: expected a whole number of at least 1, found '0'"),
    "negative frames": (["--frames", "-3"], "--frames: expected a whole number of at least 1, found '-3'"),
    "frames in words": (
        ["--frames", "many"],
        "--frames: expected a whole number of at least 1, found 'many'",
    ),
    "part of a chunk": (
        ["--frames", "20"],
        "--frames: expected a multiple of the 3 frames of a chunk, found 20",
    ),
    "more frames than the disk holds": (["--frames", 3 * 10**15], "--frames: expected latents that fit"),
    "half a patch": (["--height", "5"], "--height, --width: expected multiples of (2, 2), found (5, 6)"),
    "a cache of terabytes": (
        ["--height", 10**7],
        "--height, --width, --chunk-frames, --window: expected sizes that fit",
    ),
    "sizes beyond 64 bits": (["--width", 10**30], "--window: expected sizes that fit"),
    "unknown device": (["--device", "bogus"], "--device: expected cpu, cuda or cuda:N, found 'bogus'"),
    "device without memory": (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, found 'meta'"),
    "GPU that is not there": (["--device", "cuda:99"], "--device: expected a device for 'cuda:99', found"),
    "unknown dtype": (
        ["--dtype", "int8"],
        "--dtype: expected one of float64, float32, bfloat16, float16, found 'int8'",
    ),
    "infinite shift": (["--shift", "inf"], "--shift: expected a finite number, found 'inf'"),
    "shift of nothing": (["--shift", "0"], "--shift: expected a positive number, found 0.0"),
    "alpha": (["--alpha", "1.5"], "--alpha: expected a number in 0..1, found 1.5"),
    "alpha not a number": (["--alpha", "nan"], "--alpha: expected a finite number, found 'nan'"),
    "steps beyond the schedule": (
        ["--steps", "1000", "1001"],
        "--steps: expected steps in 0..1000, found 1001",
    ),
    "negative step": (["--steps", "-1"], "--steps: expected a whole number of at least 0, found '-1'"),
    "no chunk": (["--chunk-frames", "0"], "--chunk-frames: expected a whole number of at least 1, found '0'"),
    "sink without a window": (["--sink-frames", "9"], "--window: expected at least 10, with 9 sink frames"),
    "chunk beyond the window": (
        ["--window", "5"],
        "--window: expected a window of 3 frames, found 2 (5 frames attended",
    ),
    "sink frames of no sink": (
        ["--sink-policy", "none", "--sink-frames", "3"],
        "--sink-frames: expected 0 with sink_policy 'none', found 3",
    ),
    "unknown sink": (["--sink-policy", "mean"], "--policy: expected one of none, static, ema, steady"),
    "argument of no policy": (
        ["--policy", "two-rates:slow=1"],
        "--policy: expected two-rates:ARGUMENT=VALUE with one of long, short, adaptive, rephase, found",
    ),
    "no value": (["--policy", "cyclic:bank=%"], "--policy: expected cyclic:bank=VALUE with a number"),
    "a policy that does not fit": (
        ["--policy", "two-rates", "--sink-frames", "1"],
        "--sink-frames: expected at",
    ),
    "a window that does not hold the noise": (
        ["--rolling", "--window", "8"],
        "--window: expected at least 9, with rolling: 3 sink frames and 2 chunks of 3, found 8",
    ),
    "cuts in a rolling window": (
        ["--rolling", "--cuts", "6"],
        "--cuts: expected () with rolling, found (6,)",
    ),
    "two ways at once": (["--rolling", "--restart", "9", "3"], "--restart: expected () with rolling"),
    "an overlap of part of a chunk": (["--restart", "9", "2"], "--restart: expected (frames, overlap), over"),
    "a stretch of the overlap alone": (["--restart", "3", "3"], "frames at least 3 more, found (3, 3)"),
    "a state in stretches": (
        ["--restart", "9", "3", "--policy", "state:chunk=3", "--sink-frames", "0"],
        "--policy: expected another policy with restart, found 'state:chunk=3'",
    ),
    "unknown state": (
        ["--sink-state", "int4"],
        "--sink-state: expected one of compensated, float32, published, found",
    ),
    "heads that do not divide": (
        ["--heads", "7"],
        "--heads: expected heads of an even width (dim = 128), found 7",
    ),
    "seed": (["--seed", "0.5"], "--seed: expected a whole number, found '0.5'"),
    "no checkpoint": (
        ["--checkpoint", "nowhere.safetensors"],
        "--checkpoint: expected a readable checkpoint",
    ),
    "folder for a checkpoint": (["--checkpoint", "{tmp}"], "--checkpoint: expected a readable checkpoint"),
    "cut checkpoint": (
        ["--checkpoint", "{tmp}/cut.safetensors"],
        "cut.safetensors: not a readable safetensors file",
    ),
    "checkpoint of noise": (["--checkpoint", "{tmp}/noise.pt"], "noise.pt: not a readable checkpoint"),
    "checkpoint of another model": (["--checkpoint", "{tmp}/text.safetensors"], "patch_embedding.weight"),
    "no context": (["--context", "nowhere.safetensors"], "--context: expected a readable safetensors file"),
    "context without its name": (
        ["--context", "{tmp}/other.safetensors"],
        "--context: expected a tensor named `context`",
    ),
    "context too long": (["--context", "{tmp}/long.safetensors"], "found torch.float32 [600, 64]"),
    "context of integers": (["--context", "{tmp}/whole.safetensors"], "found torch.int64 [5, 64]"),
    "context not finite": (
        ["--context", "{tmp}/nan.safetensors"],
        "--context: expected finite numbers, found a NaN",
    ),
    "out is a file": (["--out", "{tmp}/noise.pt"], "--out: expected a folder that can be written, found"),
    "out below a file": (
        ["--out", "{tmp}/noise.pt/out"],
        "--out: expected a folder that can be written, found",
    ),
    "nothing to resume": (["--resume"], "--resume: expected an unfinished stream in"),
    "resume and overwrite": (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
    "time": (["--save-seconds", "-1"], "--save-seconds: expected a finite number of at least 0, found '-1'"),
    "unknown option": (["--frobnicate"], "unrecognized arguments: --frobnicate"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    whole = Path(CHECKPOINT).read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.pt").write_bytes(os.urandom(1000))
    save_file({"context": torch.randn(5, 64)}, folder / "text.safetensors")
    save_file({"text": torch.randn(5, 64)}, folder / "other.safetensors")
    save_file({"context": torch.randn(600, 64)}, folder / "long.safetensors")
    save_file({"context": torch.zeros(5, 64, dtype=torch.int64)}, folder / "whole.safetensors")
    save_file({"context": torch.full((5, 64), torch.nan)}, folder / "nan.safetensors")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_value_is_one_line_and_exit_code_2(name, bad_files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job.PreparedStream, "chunks", lambda *_: pytest.fail("it began to generate"))
    change, words = REFUSED[name]
    change = [str(word).format(tmp=bad_files) for word in change]
    before = files(bad_files)
    code, err = call(capsys, "--frames", "6", "--out", tmp_path / "out", *change)
    assert code == 2
    assert err.startswith("reward-forcing: error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists() and files(bad_files) == before


def test_a_model_of_unpublished_sizes_asks_for_its_heads(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["stream", "--checkpoint", CHECKPOINT, "--frames", "3", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith(
        "reward-forcing: error: --heads: expected the number of attention heads"
    )


def test_an_internal_error_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise rf.ArgumentError("rf_kernels.rope_append: argument `q`: expected a fault of ours, found one")

    monkeypatch.setattr("reward_forcing.pipeline.StreamingPipeline.stream", broken)
    with pytest.raises(rf.ArgumentError, match="a fault of ours"):
        main([*SMALL, "--frames", "3", "--out", str(tmp_path)])


# ---- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--sink-policy", "none"],
        ["--sink-frames", "0"],
        ["--policy", "static"],
        ["--policy", "two-rates:long=0.1,adaptive=true"],
        ["--policy", "cyclic", "--noisy-context"],
        ["--policy", "shots:offset=8", "--cuts", "6"],
        ["--rolling", "--policy", "rolling:frames=9", "--window", "12"],
        ["--policy", "merged:threshold=0.5"],
        ["--policy", "patches:patches=1"],
        ["--restart", "9", "3"],
        ["--steps", "1000"],
        ["--seed", "-1"],
    ],
    ids=" ".join,
)
def test_every_choice_streams_to_the_end(options, uninterrupted, tmp_path, capsys):
    code, err = call(capsys, "--frames", "15", "--out", tmp_path, *options)
    assert (code, err) == (0, "")
    latents = load_file(tmp_path / "latents.safetensors")["latents"]
    assert latents.shape == (15, 16, 4, 6) and latents.isfinite().all() and latents.std() > 0.1
    assert files(tmp_path).keys() == uninterrupted.keys() == {"latents.safetensors", "stream.json"}
    assert (tmp_path / "latents.safetensors").read_bytes() != uninterrupted["latents.safetensors"]


def test_text_features_reach_the_model(bad_files, uninterrupted, tmp_path, capsys):
    text = bad_files / "text.safetensors"
    assert call(capsys, "--frames", "15", "--out", tmp_path, "--context", text) == (0, "")
    assert (tmp_path / "latents.safetensors").read_bytes() != uninterrupted["latents.safetensors"]
    assert json.loads((tmp_path / "stream.json").read_text())["files"]["context"] == str(text)


def test_latents_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    alive, append = [], StreamFolder.append

    def counted(self, latents):
        assert sum(ref() is not None for ref in alive) <= 1
        alive.append(weakref.ref(latents.untyped_storage()))
        append(self, latents)

    monkeypatch.setattr(StreamFolder, "append", counted)
    assert main([*SMALL, "--frames", "30", "--out", str(tmp_path)]) == 0 and len(alive) == 10


def test_a_finished_stream_is_replaced_only_when_asked(uninterrupted, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    for name in OUTPUTS:
        (tmp_path / name).write_text("old")
    before = files(tmp_path)
    code, err = call(capsys, "--frames", "15", "--out", tmp_path)
    assert code == 2 and "--out: expected a folder without files of an earlier stream" in err
    assert files(tmp_path) == before
    assert call(capsys, "--frames", "15", "--out", tmp_path, "--overwrite") == (0, "")
    assert files(tmp_path) == {**uninterrupted, "mine.txt": b"kept"}  # no report of the stream before


# ---- stopped and resumed -----------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def killed_at(monkeypatch):
    """``killed_at(n)``: the n-th change that a folder makes on disk does not happen, nor anything after
    it."""
    steps = {"left": None, "dead": False}

    def counted(function):
        def step(*args, **kwargs):
            if steps["left"] is not None:
                steps["dead"] = steps["dead"] or steps["left"] == 0
                if steps["dead"]:
                    raise Killed
                steps["left"] -= 1
            return function(*args, **kwargs)

        return step

    for owner, name in (
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (os, "fsync"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    for name in ("append", "save"):
        monkeypatch.setattr(StreamFolder, name, counted(getattr(StreamFolder, name)))
    leave = StreamFolder._leave

    def gone(self):
        self._lock.close() if steps["dead"] else leave(self)

    monkeypatch.setattr(StreamFolder, "_leave", gone)
    return lambda n: steps.update(left=n, dead=False)


@pytest.mark.heavy
@pytest.mark.parametrize("earlier", [False, True], ids=["an empty folder", "a folder with a finished stream"])
def test_a_stream_killed_at_any_step_goes_on_to_the_same_files(
    earlier, uninterrupted, tmp_path, capsys, killed_at
):
    run = ["--frames", "15", "--save-seconds", "0"]
    old = {name: b"old" for name in OUTPUTS} if earlier else {}
    points = 0
    for n in range(1000):
        out = tmp_path / str(n)
        out.mkdir()
        for name, data in old.items():
            (out / name).write_bytes(data)
        killed_at(n)
        try:
            assert call(capsys, *run, "--out", out, *["--overwrite"] * earlier) == (0, "")
            break
        except Killed:
            points += 1
        finally:
            killed_at(None)
        there = {name: data for name, data in files(out).items() if "/" not in name}
        # never parts of two streams
        assert there.items() <= old.items() or there.items() <= uninterrupted.items()
        again = ["--resume"] if StreamFolder(out).begun else ["--overwrite"]
        assert call(capsys, *run, "--out", out, *again) == (0, "")
        assert files(out) == uninterrupted
    assert files(out) == uninterrupted
    assert points > 25


@pytest.mark.parametrize(
    "mode",
    [
        ["--rolling"],
        ["--rolling", "--noisy-context", "--dtype", "bfloat16"],
        ["--restart", "9", "3", "--dtype", "bfloat16"],
    ],
    ids=" ".join,
)
def test_what_a_stream_carries_beside_its_cache_is_saved_with_it(mode, tmp_path, capsys, monkeypatch):
    """Killed before each save, behind it, and between its two files."""
    run = ["--frames", "15", *mode]
    assert call(capsys, *run, "--out", tmp_path / "whole") == (0, "")
    # the latents' header is renamed first
    points = [(StreamFolder, "save", 1), (Path, "rename", 3), (StreamFolder, "save", 5)]
    for owner, name, number in points:
        out, calls, own = tmp_path / f"{name} {number}", [], getattr(owner, name)

        def killing(*args, own=own, calls=calls, number=number, **kwargs):
            calls.append(args)
            if len(calls) == number:
                raise Killed
            return own(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killing)
            with pytest.raises(Killed):
                call(capsys, *run, "--out", out, "--save-seconds", "0")
        kept = list((out / "stream.part").glob("carry-*"))
        assert (number > 2) <= len(kept) <= 2
        assert call(capsys, *run, "--out", out, "--resume", "--save-seconds", "0") == (0, "")
        assert files(out) == files(tmp_path / "whole")


class Process:
    """A stream of many chunks in a process of its own."""

    def __init__(self, out: Path, *options):
        self.latents = out / "stream.part" / "latents.safetensors"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
        command = [sys.executable, "-m", "reward_forcing.cli", *SMALL, *LONG, "--out", str(out), *options]
        self.popen = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_for(self, frames: int) -> None:
        size, deadline = 4 * 16 * 4 * 6 * frames, time.monotonic() + 120
        while not (self.latents.exists() and self.latents.stat().st_size > size + 200):
            assert self.popen.poll() is None and time.monotonic() < deadline, self.popen.communicate()
            time.sleep(0.005)

    def end(self, number: int | None = None) -> tuple[int, str]:
        if number is not None:
            self.popen.send_signal(number)
        _, err = self.popen.communicate(timeout=120)
        return self.popen.returncode, err


LONG = ["--frames", "450"]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    assert main([*SMALL, *LONG, "--out", str(folder)]) == 0
    return files(folder)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "number, frames, saves",
    [
        (signal.SIGINT, 60, "60"),
        (signal.SIGKILL, 33, "0"),  # the cache was saved after every chunk,
        pytest.param(signal.SIGKILL, 33, "60", marks=pytest.mark.heavy),  # or not once
        pytest.param(signal.SIGINT, 0, "60", marks=pytest.mark.heavy),
        pytest.param(signal.SIGTERM, 21, "60", marks=pytest.mark.heavy),
    ],
)
def test_a_process_stopped_by_a_signal_is_resumed(number, frames, saves, long_run, tmp_path, capsys):
    process = Process(tmp_path, "--save-seconds", saves)
    process.wait_for(frames)
    code, err = call(capsys, *LONG, "--out", tmp_path)  # a second run into the folder
    assert code == 2 and "--out: expected a folder that no other run writes into" in err
    code, err = process.end(number)
    assert not (tmp_path / "latents.safetensors").exists() and process.latents.exists()
    if number == signal.SIGKILL:
        assert (code, err) == (-number, "")
    else:
        assert code == 128 + number
        assert err.startswith("reward-forcing: stopped after ") and err.count("\n") == 1
        assert err.rstrip().endswith("--save-seconds 60 --resume")
    code, err = call(capsys, *LONG, "--out", tmp_path)
    assert code == 2 and "--out: expected a folder without an unfinished stream (--resume continues it" in err
    assert call(capsys, *LONG, "--out", tmp_path, "--resume") == (0, "")
    assert files(tmp_path) == long_run


def test_a_signal_during_preparation_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job.StreamJob, "prepare", lambda self: os.kill(os.getpid(), signal.SIGINT))
    code, err = call(capsys, "--frames", "3", "--out", tmp_path / "out")
    assert (code, err) == (130, "reward-forcing: stopped; nothing was written\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_pytorch_is_imported_is_one_line(tmp_path):
    process = Process(tmp_path / "out")
    maps = Path(f"/proc/{process.popen.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.popen.poll() is None
    code, err = process.end(signal.SIGINT)
    assert err == "reward-forcing: stopped; nothing was written\n"
    # Where the signal arrives inside exec(), Python itself ends by the signal: 130 to a shell all the same.
    assert code in (130, -signal.SIGINT)
    assert not (tmp_path / "out").exists()


def test_options_are_refused_before_pytorch_is_imported():
    check = (
        "import sys, reward_forcing.cli as cli\ntry: cli.main(sys.argv[1:])\nfinally: assert 'torch' not in"
        " sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    for words in (["stream", "--frames", "0"], ["stream", "--help"]):
        run = subprocess.run(
            [sys.executable, "-c", check, *words], env=environment, capture_output=True, text=True
        )
        assert run.returncode == (0 if "--help" in words else 2) and run.stderr.count("\n") == (
            "--help" not in words
        )


def test_a_second_ctrl_c_does_not_wait_for_the_chunk(uninterrupted, tmp_path, capsys, monkeypatch):
    def impatient(self, shape, draw=job.ChunkNoise.draw):
        if self.place == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, shape)

    with monkeypatch.context() as patch:
        patch.setattr(job.ChunkNoise, "draw", impatient)
        code, err = call(capsys, "--frames", "15", "--out", tmp_path, "--save-seconds", "0")
    assert code == 130 and err.count("\n") == 1 and "go on with: reward-forcing stream " in err
    assert call(capsys, "--frames", "15", "--out", tmp_path, "--resume") == (0, "")
    assert files(tmp_path) == uninterrupted


def test_memory_that_the_check_could_not_foresee(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "free_memory", lambda device: None)  # a system that does not say
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=2**63))
    code, err = call(capsys, "--frames", "3", "--height", str(10**12), "--out", tmp_path)
    assert (
        code == 1 and err.startswith("reward-forcing: error: ") and err.count("\n") == 1 and "allocate" in err
    )


def test_a_lock_whose_file_has_left_is_taken_anew(tmp_path, monkeypatch):
    """Between opening the lock and locking it, the run that held it finishes and takes the file away."""

    def late(file, operation, flock=fcntl.flock):
        monkeypatch.setattr(fcntl, "flock", flock)
        os.unlink(file.name)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with StreamFolder(tmp_path / "out") as held:
        assert (held.part / "lock").exists()
        with (
            pytest.raises(rf.ArgumentError, match="a folder that no other run writes into"),
            StreamFolder(held.out),
        ):
            pass


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (None, "frames 9..11: expected finite latents"),
    ],
    ids=["a full disk", "latents that are not finite"],
)
def test_a_failure_on_the_way_is_one_line_and_the_rest_is_kept(
    error, words, uninterrupted, tmp_path, capsys, monkeypatch
):
    def failing(self, shape, draw=job.ChunkNoise.draw):
        if self.place == 9 and error is not None:
            raise error
        return draw(self, shape) * (torch.inf if self.place == 9 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(job.ChunkNoise, "draw", failing)
        code, err = call(capsys, "--frames", "15", "--out", tmp_path, "--save-seconds", "0")
    assert code == 1 and err.startswith("reward-forcing: error: ") and err.count("\n") == 1 and words in err
    assert files(tmp_path).keys() == {
        f"stream.part/{n}" for n in ("latents.safetensors", "cache.safetensors", "lock", "settings.json")
    }
    assert call(capsys, "--frames", "15", "--out", tmp_path, "--resume") == (0, "")
    assert files(tmp_path) == uninterrupted


@pytest.fixture
def unfinished(tmp_path, capsys, monkeypatch):
    """A folder with a stream of 15 frames that was stopped after some."""

    def stopping(self, latents, append=StreamFolder.append):
        append(self, latents)
        if self.frames == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StreamFolder, "append", stopping)
        code, err = call(capsys, "--frames", "15", "--out", tmp_path)
    assert code == 130 and "stopped after 12 of 15 frames" in err
    return tmp_path


@pytest.mark.parametrize(
    "change, words",
    [
        (["--seed", "1"], "--seed: expected 0, with which the stream in"),
        (["--frames", "18"], "--frames: expected 15, with which"),
        (["--sink-policy", "static"], "--policy: expected 'ema', with which"),
        (["--dtype", "float64"], "--dtype: expected 'float32', with which"),
        (["--checkpoint", "{other}"], "--checkpoint: expected '"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_resume_needs_the_same_stream(change, words, unfinished, uninterrupted, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other") / "other.safetensors"
    weights = load_file(CHECKPOINT)
    save_file({name: weight * 2 for name, weight in weights.items()}, other)
    before = files(unfinished)
    code, err = call(
        capsys, "--frames", "15", "--out", unfinished, "--resume", *[w.format(other=other) for w in change]
    )
    assert code == 2 and err.count("\n") == 1 and words in err
    assert files(unfinished) == before
    assert call(capsys, "--frames", "15", "--out", unfinished, "--resume") == (0, "")
    assert files(unfinished) == uninterrupted


def test_a_copy_of_the_checkpoint_resumes_too(unfinished, uninterrupted, tmp_path_factory, capsys):
    copy = tmp_path_factory.mktemp("copy") / "weights.safetensors"
    copy.write_bytes(Path(CHECKPOINT).read_bytes())
    assert call(capsys, "--frames", "15", "--out", unfinished, "--resume", "--checkpoint", copy) == (0, "")
    assert files(unfinished)["latents.safetensors"] == uninterrupted["latents.safetensors"]


def test_an_unfinished_stream_is_discarded_when_asked(unfinished, capsys):
    assert call(capsys, "--frames", "6", "--out", unfinished, "--overwrite") == (0, "")
    assert load_file(unfinished / "latents.safetensors")["latents"].shape[0] == 6
    assert not (unfinished / "stream.part").exists()


@pytest.mark.parametrize(
    "name, damage, words",
    [
        ("cache.safetensors", lambda data: data[:1000], "--resume: expected the saved cache of this stream"),
        (
            "cache.safetensors",
            lambda data: os.urandom(1000),
            "--resume: expected the saved cache of this stream",
        ),
        ("settings.json", lambda data: data[:20], "--resume: expected a readable settings.json"),
        ("settings.json", lambda data: b"[]", "with which the stream in"),
        (
            "latents.safetensors",
            lambda data: data[:500],
            "--resume: expected at least the 12 frames that the cache",
        ),
        ("latents.safetensors", lambda data: bytes(len(data)), "--resume: expected latents [15, 16, 4, 6]"),
    ],
)
def test_a_damaged_unfinished_stream_is_refused(name, damage, words, unfinished, capsys):
    path = unfinished / "stream.part" / name
    path.write_bytes(damage(path.read_bytes()))
    before = files(unfinished)
    code, err = call(capsys, "--frames", "15", "--out", unfinished, "--resume")
    assert code == 2 and err.startswith("reward-forcing: error: ") and err.count("\n") == 1 and words in err
    assert files(unfinished) == before
