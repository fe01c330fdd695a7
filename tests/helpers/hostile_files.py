"""Damaged and hostile files, drawn from seeds, and a process that loads them: `python
tests/helpers/hostile_files.py stream 0 1000`.

A mutation of a good file is refused with the error that the loader documents, or loaded correctly: what was
loaded is then, bit for bit, what an independent reading of the file says. The process measures its peak of
resident memory around every load, and refuses to give a loader more than a fixed address space, so that a
claimed size which is allocated becomes a failure.
"""

import ctypes
import gc
import io
import json
import random
import re
import resource
import struct
import sys
import tempfile
import traceback
import zipfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("", "python", "tests")]

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import rf_kernels as rf
from helpers.golden_cases import GOLDEN_DIR, Tensors
from helpers.promise_tools import make_cache, step
from reward_forcing import checkpoint
from reward_forcing.config import ModelConfig
from reward_forcing.models import CausalWanModel

#: Resident memory that a load may take beyond twice the file: the allocator's granularity and the
#: interpreter's own objects (a file of 27 bytes takes 37 kB).
SLACK = 1 << 18
ADDRESS_SPACE = 1 << 30

ITEM = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8}


# ---- independent reading -----------------------------------------------------------------------------------
def header_of(data: bytes) -> tuple[dict, int]:
    """Header of a safetensors file and the offset of its data."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), 8 + length


def with_header(header: dict | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_as_in_file(data: bytes, loaded: dict[str, torch.Tensor], name_of=lambda name: name) -> None:
    header, start = header_of(data)
    for name, tensor in loaded.items():
        entry = header[name_of(name)]
        first, last = entry["data_offsets"]
        assert entry["shape"] == list(tensor.shape), name
        assert ITEM[entry["dtype"]] == tensor.element_size(), name
        assert raw(tensor) == data[start + first : start + last], name


# ---- mutations ---------------------------------------------------------------------------------------------
def flip(rng, data: bytes, low=0, high=None) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(low, high or len(data))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng, data):
    return data[
        : rng.choice((rng.randrange(len(data)), rng.randrange(200), len(data) - 1 - rng.randrange(64)))
    ]


def splice(rng, data):
    size = rng.randrange(1, 4096)
    here, there = (rng.randrange(len(data) - size) for _ in range(2))
    return data[:here] + data[there : there + size] + data[here + size :]


def blank(rng, data):
    size = rng.randrange(1, 4096)
    here = rng.choice((rng.randrange(len(data) - size), 0, len(data) - size))
    return data[:here] + bytes([rng.choice((0, 255))]) * size + data[here + size :]


def insert(rng, data):
    here = rng.choice((0, rng.randrange(len(data)), len(data)))
    return data[:here] + rng.randbytes(rng.randrange(1, 64)) + data[here:]


ANYWHERE = (flip, cut, splice, blank, insert)


def claimed_header(rng, data):
    length = struct.unpack("<Q", data[:8])[0]
    claim = rng.choice(
        (0, 1, length - 1, length + 1, len(data), 10**8, 2**31, 2**32 + length, 2**63, 2**64 - 1)
    )
    return struct.pack("<Q", claim) + data[8:]


def flip_header(rng, data):
    return flip(rng, data, 0, header_of(data)[1])


def edit_entry(rng, data):
    """One entry of the header says something else."""
    header, start = header_of(data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    huge = rng.choice((2**31, 2**40, 2**62, 2**64, -1))
    edit = rng.randrange(9)
    if edit == 0:
        entry["dtype"] = rng.choice(
            ("F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None)
        )
    elif edit == 1 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = huge
    elif edit == 2:
        entry["shape"] = rng.choice(
            ([], [0], entry["shape"][::-1] + [1], [1] * 70, [2**32, 2**32], None, "x")
        )
    elif edit == 3:
        entry["data_offsets"] = [entry["data_offsets"][0], huge]
    elif edit == 4:
        entry["data_offsets"] = rng.choice(
            ([0, 8], entry["data_offsets"][::-1], [0], [0, 0], [2**63, 2**63 + 8], None)
        )
    elif edit == 5:
        del header[name]
    elif edit == 6:
        header[rng.choice(("more", "", "\0", "k" * 2000, "__metadata__"))] = header.pop(name)
    elif edit == 7:
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    else:
        entry.pop(rng.choice(list(entry)))
    return with_header(header, data[start:])


def edit_metadata(rng, data):
    header, start = header_of(data)
    wrong = rng.choice(
        (
            None,
            {},
            {"rf_kernels": ""},
            {"rf_kernels": "[]"},
            {"rf_kernels": "[" * 1500},
            {"rf_kernels": 3},
            [],
            "x",
            {"rf_kernels": '{"a":' * 1200},
            {"rf_kernels": "9" * 6000},
            {"x": "y"},
        )
    )
    meta = json.loads(header.get("__metadata__", {}).get("rf_kernels", "{}"))
    if meta and rng.random() < 0.6:
        name = rng.choice(list(meta))
        meta[name] = rng.choice(
            (None, -1, 0, 2, 2**53, 10**300, 1e400, "x", [], {}, [[]] * 99, not meta[name], {"a": meta[name]})
        )
        wrong = {"rf_kernels": json.dumps(meta)}
    header["__metadata__"] = wrong
    return with_header(header, data[start:])


def flood_header(rng, data):
    """A file that is a header and little else: thousands of empty tensors, or deep or long metadata."""
    kind = rng.randrange(3)
    if kind == 0:
        text = (
            "{"
            + ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(20_000))
            + "}"
        )
        return with_header(text, b"")
    if kind == 1:
        return with_header('{"a":' * 300_000, b"")
    return with_header({"__metadata__": {"rf_kernels": "[" + "[]," * 500_000 + "[]]"}}, b"")


SAFETENSORS = (
    claimed_header,
    flip_header,
    flip_header,
    edit_entry,
    edit_entry,
    edit_entry,
    edit_metadata,
    flood_header,
)


def rewrite(data: bytes, change=None, compress=zipfile.ZIP_STORED, more=()) -> bytes:
    """The archive again, with other contents of its records."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", compress) as target:
        for record in source.infolist():
            content = source.read(record)
            content = change(record.filename, content) if change else content
            if content is not None:
                target.writestr(record.filename, content)
        for name, content in more:
            target.writestr(name, content)
    return out.getvalue()


def in_pickle(change):
    return lambda name, content: change(content) if name.endswith("data.pkl") else content


def flip_pickle(rng, data):
    """Damage inside the pickle under a checksum that was made to fit."""
    return rewrite(data, in_pickle(lambda content: flip(rng, content, 2)))


def flip_directory(rng, data):
    return flip(rng, data, len(data) - 4000)


def claim_storage(rng, data):
    """Numbers in the pickle (sizes, strides, offsets, storages) become huge."""
    huge = b"\x8a\x08" + struct.pack("<q", rng.choice((2**31, 2**40, 2**62, -(2**40), 10**6)))

    def change(content):
        numbers = [m.start() for m in re.finditer(rb"[KMJ](?=.)", content)]
        at = rng.choice(numbers)
        return content[:at] + huge + content[at + {b"K": 2, b"M": 3, b"J": 5}[content[at : at + 1]] :]

    return rewrite(data, in_pickle(change))


def lose_record(rng, data):
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    lost = rng.choice(names)
    if rng.random() < 0.5:
        return rewrite(data, lambda name, content: None if name == lost else content)
    return rewrite(data, lambda name, content: content[: len(content) // 2] if name == lost else content)


def bomb(rng, data):
    """Few bytes that ask for many: compressed records, deep tuples, floods of objects and of records,
    expanded tensors."""
    kind = rng.randrange(5)
    if kind == 0:
        return rewrite(data, in_pickle(lambda content: content + bytes(1 << 26)), zipfile.ZIP_DEFLATED)
    if kind == 1:
        return rewrite(
            data,
            in_pickle(
                lambda content: b"\x80\x02}()" + b"\x85" * rng.choice((10**3, 10**5, 10**6)) + b"K\x01u."
            ),
        )
    if kind == 2:
        return rewrite(data, in_pickle(lambda content: b"\x80\x02](" + b"]" * 10**6 + b"e."))
    if kind == 3:
        return rewrite(data, more=[(f"archive/{i}", b"") for i in range(5000)])
    state = dict(torch.load(io.BytesIO(data), weights_only=True))
    name = max(state, key=lambda n: state[n].numel())
    state[name] = torch.zeros(1).expand(2**40 if rng.random() < 0.5 else state[name].shape)
    return saved(state)


def other_contents(rng, data):
    """Good pickles of what no parameter is."""
    state = dict(torch.load(io.BytesIO(data), weights_only=True))
    name = rng.choice(sorted(state))
    x = state[name]
    state[name] = rng.choice(
        (
            x.to_sparse(),
            x.to("meta"),
            x.to(torch.complex64),
            x.int(),
            x[None],
            None,
            "text",
            [x],
            {"a": x},
            x.bool(),
            print,
        )
    )
    return saved(state)


def saved(state, **options) -> bytes:
    out = io.BytesIO()
    torch.save(state, out, **options)
    return out.getvalue()


def legacy(rng, data):
    return saved(torch.load(io.BytesIO(data), weights_only=True), _use_new_zipfile_serialization=False)


ARCHIVES = (
    flip_pickle,
    flip_pickle,
    flip_directory,
    claim_storage,
    claim_storage,
    lose_record,
    bomb,
    other_contents,
    legacy,
)

#: What no loader may accept, whatever else it does.
NEVER = (cut, claimed_header, flood_header, legacy, other_contents, bomb)


# ---- loaders -----------------------------------------------------------------------------------------------
class Stream:
    """SinkWindowCache.save and load."""

    suffix, refusals, kinds = ".safetensors", (rf.ArgumentError,), ANYWHERE + SAFETENSORS

    def __init__(self, folder):
        def cache(policy="compensated"):
            return make_cache(policy, grid=(16, 12), dtype=torch.bfloat16, heads=2, head_dim=64)

        source, self.cache = cache(), cache()
        for chunk in range(5):
            step(source, 2, chunk, forwards=1)
        source.save(folder / "good")
        self.good = (folder / "good").read_bytes()
        other = cache("float32")
        other.save(folder / "other")
        version = self.good.replace(b'\\"version\\": 2', b'\\"version\\": 3')
        assert version != self.good
        self.others = [(folder / "other").read_bytes(), version, saved({"k": source.k}), self.good[::-1]]

    def load(self, path):
        self.cache.load(path)
        return self.cache

    def check(self, data, cache):
        meta = json.loads(header_of(data)[0]["__metadata__"]["rf_kernels"])
        assert cache.next_frame == meta["next_frame"]
        valid = {"k": cache.k[:, :, : cache.kv_tokens], "v": cache.v[:, :, : cache.kv_tokens]}
        assert_as_in_file(data, valid | {f"sink.{name}": t for name, t in cache._sink.tensors.items()})
        step(cache, 1, 0, forwards=1)  # and it goes on


class Checkpoint:
    """load_causal_model from a safetensors file."""

    suffix, refusals, kinds = ".safetensors", (checkpoint.CheckpointError,), ANYWHERE + SAFETENSORS

    def config(self, width=96):
        return ModelConfig(
            dim=width,
            ffn_dim=4 * width,
            freq_dim=32,
            text_dim=32,
            num_heads=2,
            num_layers=4,
            in_dim=4,
            out_dim=4,
            text_len=6,
        )

    def write(self, state, path):
        save_file(state, path)

    def __init__(self, folder):
        torch.manual_seed(0)
        models = [CausalWanModel(self.config(width)).state_dict() for width in (96, 72)]
        for name, state in zip(("good", "other"), models, strict=True):
            self.write(state, folder / name)
        self.good, self.state = (folder / "good").read_bytes(), models[0]
        short = {name: t for name, t in models[0].items() if "blocks.3" not in name}
        wrong_name = (
            saved(models[0]) if self.suffix == ".safetensors" else b"\x20" + bytes(7) + b"{}" + b" " * 30
        )
        self.write(short, folder / "short")
        self.others = [(folder / name).read_bytes() for name in ("other", "short")] + [
            wrong_name,
            self.good[::-1],
        ]

    def load(self, path):
        return checkpoint.load_causal_model(path, self.config(), dtype=torch.float32).state_dict()

    def check(self, data, state):
        assert_as_in_file(data, state)


class Pickled(Checkpoint):
    """load_causal_model from what torch.save wrote."""

    suffix, kinds = ".pt", ANYWHERE + ARCHIVES

    def write(self, state, path):
        torch.save(dict(state), path)

    def check(self, data, state):
        """Written again: what torch reads without a map, which compares sizes. In place: no more bytes differ
        than in the file."""
        assert state.keys() == self.state.keys()
        if len(data) != len(self.good):
            expected = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            assert all(raw(state[name]) == raw(expected[name]) for name in state)
            return
        differing = sum(a != b for a, b in zip(data, self.good, strict=True))
        pairs = [(raw(state[name]), raw(self.state[name])) for name in state]
        assert sum(sum(a != b for a, b in zip(x, y, strict=True)) for x, y in pairs if x != y) <= differing


class Golden:
    """Files of a golden set, read through the loader of the tests."""

    suffix, refusals, kinds = ".safetensors", (SafetensorError, ValueError, OSError), ANYWHERE + SAFETENSORS

    def __init__(self, folder):
        self.good = (GOLDEN_DIR / "B02_stream_c1s1w5_b2.safetensors").read_bytes()
        self.others = [self.good[::-1], saved({"a": torch.zeros(3)})]

    def load(self, path):
        return dict(Tensors(path))

    def check(self, data, loaded):
        header, start = header_of(data)
        for name, tensor in loaded.items():
            first, last = header[name]["data_offsets"]
            assert (
                header[name]["shape"] == list(tensor.shape)
                and raw(tensor) == data[start + first : start + last]
            ), name


FORMATS = {"stream": Stream, "checkpoint": Checkpoint, "pickled": Pickled, "golden": Golden}


# ---- a process of its own ----------------------------------------------------------------------------------
def status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def peak_of(call):
    """(result or exception, growth of resident memory at its peak)."""
    gc.collect()
    # memory that malloc kept of an earlier load would hide what this one takes
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    try:
        result = call()
    except Exception as error:
        result = error
    return result, status("VmHWM") - before


def mutation(target, seed: int) -> tuple[str, bytes]:
    rng = random.Random(f"{target.__class__.__name__} {seed}")
    if rng.random() < 0.06:
        return "other", rng.choice(target.others)
    kind = rng.choice(target.kinds)
    return kind.__name__, kind(rng, target.good)


def run(name: str, first: int, last: int) -> dict:
    """Load mutations ``first`` to ``last`` of a format; counts by outcome, the largest growth, and what went
    wrong."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        target = FORMATS[name](folder)
        path = folder / f"file{target.suffix}"
        path.write_bytes(target.good)
        for _ in range(2):  # what is imported and cached at a first load
            target.check(target.good, target.load(path))
        gc.freeze()  # or every collection before a load looks at all that was imported
        assert peak_of(lambda: torch.ones(8 << 20))[1] >= 30 << 20, "the meter of memory does not work"
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ADDRESS_SPACE,) * 2)
        report = {
            "refused": 0,
            "loaded": 0,
            "kinds": {},
            "bytes": len(target.good),
            "worst": 0.0,
            "failures": [],
        }
        never = {kind.__name__ for kind in NEVER} | {"other"}
        for seed in range(first, last):
            kind, data = mutation(target, seed)
            path.write_bytes(data)
            # the last line names what a crash was about
            print(f"{name} {seed} {kind}", file=sys.stderr, flush=True)
            for _ in range(3):
                result, peak = peak_of(lambda: target.load(path))
                if peak <= (most := 2 * len(data) + SLACK):
                    # once is enough: pages of code that the system had taken back come again with a load, and
                    # then stay
                    break
            fault = None
            if isinstance(result, target.refusals):
                report["refused"] += 1
                if "allocate" in str(result) or "memory" in type(result.__cause__).__name__.lower():
                    fault = f"refused only when memory ran out: {result}"
            elif isinstance(result, Exception):
                fault = "".join(traceback.format_exception(result)[-3:])
            else:
                report["loaded"] += 1
                try:
                    assert data == target.good or kind not in never, "accepted"
                    target.check(data, result)
                except Exception:
                    fault = traceback.format_exc()
            if len(data) >= len(target.good) // 2:
                report["worst"] = max(report["worst"], peak / len(data))
            if peak > most:
                fault = f"{peak} bytes for a file of {len(data)}"
            report["kinds"][kind] = report["kinds"].get(kind, 0) + 1
            if fault:
                report["failures"].append(f"{name} {seed} {kind}: {fault}")
            del result
        return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
