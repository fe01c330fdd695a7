"""Checkpoints: published parameter names from .safetensors and .pt files, whatever wrapped the model when it
was saved.

A file may hold the parameters at its top level or under ``generator``, ``generator_ema`` or ``model``; names
may carry FSDP, compile, activation-checkpointing or DDP wrappers and a leading prefix such as ``model.``. A
.pt file is read with ``weights_only=True``: a pickle that wants to run code is refused, and so are archives
older than torch 1.6.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ._files import check_archive, check_header, storages_are_records
from .config import ModelConfig
from .models import BidirectionalWanModel, CausalWanModel

#: Entries of a training checkpoint that may hold a model, in the order they are looked for.
ENTRIES = ("generator", "generator_ema", "model")

#: What wrappers insert into parameter names.
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")

#: Every Wan transformer has this parameter, once: what stands before it in a file is the prefix of all.
_ANCHOR = "patch_embedding.weight"

_PRESETS = (ModelConfig.wan_1_3b, ModelConfig.wan_14b)


class CheckpointError(ValueError):
    """A file that is not a checkpoint of the model: says which file, and which names or shapes."""


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: unreadable, or with a header that claims too much.
    """
    from safetensors.torch import load_file

    try:
        check_header(path)
        return load_file(path)
    except PermissionError:
        raise
    except Exception as error:
        # a damaged header fails in the parser, or anywhere in what builds tensors from it
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> Mapping:
    try:
        places = check_archive(path)
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors and plain containers: {reason}"
        ) from error
    except Exception as error:  # a damaged pickle fails wherever its opcodes lead
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, found {type(data).__name__}")
    _check_storages(data, places, path)
    return data


def _check_storages(data: Mapping, places: dict[int, int], path: Path) -> None:
    """Tensors are mapped, and what a storage claims is not compared with its record: it would reach into its
    neighbours."""
    entries = [values for values in data.values() if isinstance(values, Mapping)]
    tensors = [
        value for mapping in (data, *entries) for value in mapping.values() if isinstance(value, Tensor)
    ]
    dense = [
        t for t in tensors if t.layout == torch.strided and t.device.type == "cpu"
    ]  # others are refused where asked for
    storages = [(s.data_ptr(), s.nbytes()) for s in (t.untyped_storage() for t in dense) if s.nbytes()]
    if not storages_are_records(storages, places):
        raise CheckpointError(f"{path}: the storages that its tensors claim are not its records")


def _select(data: Mapping, entry: str | None, path: Path) -> Mapping:
    """The mapping that holds the parameters."""
    nested = [name for name in data if isinstance(data[name], Mapping)]
    if entry is not None:
        if entry not in nested:
            raise CheckpointError(
                f"{path}: no entry '{entry}'; it has {_some(map(str, nested)) or 'no entries'}"
            )
        return data[entry]
    for name in ENTRIES:
        if name in nested:
            return data[name]
    return data


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def _published_names(tensors: Mapping, path: Path) -> dict[str, Tensor]:
    """Parameters under their published names: without wrappers and common prefix, and with nothing left
    over."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: expected tensors by name, found {name!r:.80}: {type(tensor).__name__}"
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            found = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            raise CheckpointError(
                f"{path}: expected {name} as a dense tensor of floating point, found {found}"
            )
        bare = _unwrapped(name)
        if bare in state:
            raise CheckpointError(f"{path}: two tensors for {bare}, one of them named {name}")
        state[bare] = tensor
    # Strides of 0 make a tensor of any size out of one element; the copy that a conversion makes would have
    # that size.
    claimed = sum(t.numel() * t.element_size() for t in state.values())
    held = sum(file.stat().st_size for file in (_parts(path) if path.is_dir() else [path]))
    if claimed > held:
        raise CheckpointError(f"{path}: its tensors claim {claimed} bytes, in a file of {held}")
    prefixes = [
        name.removesuffix(_ANCHOR) for name in state if name == _ANCHOR or name.endswith("." + _ANCHOR)
    ]
    if len(prefixes) != 1:
        found = f"the prefixes {prefixes}" if prefixes else f"none among {_some(state) or 'no tensors'}"
        raise CheckpointError(f"{path}: expected one tensor named [prefix.]{_ANCHOR}, found {found}")
    outside = [name for name in state if not name.startswith(prefixes[0])]
    if outside:
        raise CheckpointError(
            f"{path}: names without the prefix '{prefixes[0]}' of the others: {_some(outside)}"
        )
    return {name.removeprefix(prefixes[0]): tensor for name, tensor in state.items()}


def read_tensors(path: str | Path) -> Mapping:
    """What a file holds: tensors by name, of .pt and .pth files also mappings of them. Nothing is unpickled
    but those. Of a folder: the tensors of all its ``diffusion_pytorch_model*.safetensors``, of which
    Wan2.1-T2V-14B has six.

    Raises:
        CheckpointError: unreadable or hostile.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.is_dir():
        parts = [read_safetensors(part) for part in _parts(path)]
        return {name: tensor for part in parts for name, tensor in part.items()}
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _parts(folder: Path) -> list[Path]:
    """The files of a folder of weights, all that its index lists."""
    found = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        try:
            listed = {folder / str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a list of weights: {error}") from error
        if missing := {part.name for part in listed - set(found)}:
            raise CheckpointError(f"{folder}: missing: {_some(missing)}")
        found = sorted(listed)
    if not found:
        raise FileNotFoundError(f"no checkpoint at {folder}: no diffusion_pytorch_model*.safetensors")
    return found


def read_checkpoint(path: str | Path, *, entry: str | None = None) -> dict[str, Tensor]:
    """Parameters of a checkpoint under their published names, on the CPU, in the file's dtypes.

    Args:
        path: a .safetensors file, what ``torch.save`` wrote, or a folder of Wan's.
        entry: name of the entry that holds the model. Default: the first of ``ENTRIES`` that the file has,
            else its top level.
    Raises:
        CheckpointError: unreadable, hostile, ambiguous, or not a Wan transformer.
        FileNotFoundError: no such file.
    """
    path, tensors = Path(path), read_tensors(path)
    if path.is_dir() or path.suffix == ".safetensors":
        if entry is not None:
            tensors = {name: t for name, t in tensors.items() if name.startswith(entry + ".")}
    else:
        tensors = _select(tensors, entry, path)
    return _published_names(tensors, path)


def infer_config(state: Mapping[str, Tensor], *, num_heads: int | None = None, **overrides) -> ModelConfig:
    """The sizes that the tensors of a checkpoint show.

    Args:
        state: parameters under their published names.
        num_heads: tensors do not show it. Default: that of the published model (1.3B, 14B) with this width
            and depth; an error without one.
        overrides: further fields of ``ModelConfig`` (``text_len`` and ``eps`` are not in the tensors either).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    needed = {
        _ANCHOR: 5,
        "blocks.0.ffn.0.weight": 2,
        "time_embedding.0.weight": 2,
        "text_embedding.0.weight": 2,
        "head.head.weight": 2,
    }
    wrong = [name for name, rank in needed.items() if len(shapes.get(name, ())) != rank]
    if wrong:
        raise CheckpointError(f"cannot infer a configuration: missing or of another rank: {_some(wrong)}")
    dim, in_dim, *patch_size = shapes[_ANCHOR]
    layers = {
        int(name.split(".")[1])
        for name in shapes
        if name.startswith("blocks.") and name.split(".")[1].isdigit()
    }
    sizes = {
        "dim": dim,
        "in_dim": in_dim,
        "patch_size": tuple(patch_size),
        "num_layers": max(layers) + 1,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "text_dim": shapes["text_embedding.0.weight"][1],
        "out_dim": shapes["head.head.weight"][0] // prod(patch_size),
        "qk_norm": "blocks.0.self_attn.norm_q.weight" in shapes,
        "linear_proj": "blocks.0.self_attn.linear_proj.weight" in shapes,
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
    }
    if num_heads is None:
        published = [preset() for preset in _PRESETS]
        heads = [c.num_heads for c in published if (c.dim, c.num_layers) == (dim, sizes["num_layers"])]
        if not heads:
            sizes = f"a width of {dim} and {len(layers)} blocks"
            raise CheckpointError(f"cannot infer num_heads: no published model has {sizes}; pass it")
        num_heads = heads[0]
    return ModelConfig(**{**sizes, "num_heads": num_heads, **overrides})


def check_state(state: Mapping[str, Tensor], model: torch.nn.Module, source: str = "checkpoint") -> None:
    """Raise ``CheckpointError`` naming what is missing, unexpected, or of another shape than the model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults = []
    if missing := wanted.keys() - found.keys():
        faults.append(f"missing: {_some(missing)}")
    if unexpected := found.keys() - wanted.keys():
        faults.append(f"unexpected: {_some(unexpected)}")
    shared = sorted(wanted.keys() & found.keys())
    if wrong := [
        f"{name} {found[name]}, expected {wanted[name]}" for name in shared if found[name] != wanted[name]
    ]:
        faults.append(f"shape: {_some(wrong)}")
    if faults:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}")


def _load(cls, path: str | Path, config: ModelConfig | None, entry: str | None, dtype, device, sizes: dict):
    state = read_checkpoint(path, entry=entry)
    if config is None:
        config = infer_config(state, **sizes)
    elif sizes:
        raise TypeError(f"sizes {sorted(sizes)} beside a config: put them into the config")
    return build_model(cls, state, config, source=str(path), dtype=dtype, device=device)


def build_model(cls, state: Mapping[str, Tensor], config: ModelConfig, *, source: str, dtype, device):
    """A model of class ``cls`` around the parameters that ``read_checkpoint`` returned; ``source`` names them
    in errors."""
    with torch.device("meta"):  # no memory, and no random numbers, for what the checkpoint replaces
        model = cls(config)
    check_state(state, model, source)
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def load_causal_model(
    path: str | Path,
    config: ModelConfig | None = None,
    *,
    entry: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    **sizes,
) -> CausalWanModel:
    """The causal model with the parameters of a checkpoint, in evaluation mode, without gradients.

    Args:
        path, entry: see ``read_checkpoint``.
        config: sizes of the model. Default: ``infer_config`` with ``sizes`` (``num_heads=...``,
            ``text_len=...``).
    Raises:
        CheckpointError: unreadable, or it does not fit the model; nothing is loaded in part.
    """
    return _load(CausalWanModel, path, config, entry, dtype, device, sizes)


def load_bidirectional_model(
    path: str | Path,
    config: ModelConfig | None = None,
    *,
    entry: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    **sizes,
) -> BidirectionalWanModel:
    """As ``load_causal_model``, for the bidirectional model; the parameters of the two have the same names
    and shapes."""
    return _load(BidirectionalWanModel, path, config, entry, dtype, device, sizes)
