"""Stage: the device as PyTorch sees it, its ceilings, and which peers there are. ``python -m
benchmarks.gpu_suite.device``"""

import importlib.metadata

import torch

from rf_kernels import doctor

from .. import roof
from .attention import flash_attention_3
from .jobs import Options, reason

PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "matplotlib",
    "pytest",
)


def installed() -> dict[str, str | None]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        found["flash_attention_3"] = flash_attention_3().__module__
    except Exception as error:
        found["flash_attention_3"] = reason(error)
    return found


def properties() -> dict:
    device = torch.cuda.get_device_properties(0)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    return {name: getattr(device, name, None) for name in names} | {"cudnn": torch.backends.cudnn.version()}


def main(arguments=None) -> None:
    options = Options.parse(arguments)
    cuda = options.device == "cuda"
    options.rows.add("device", packages=installed(), properties=properties() if cuda else None)
    options.rows.add("doctor", devices=doctor.devices(), self_test=doctor.self_test())
    dtypes = (torch.bfloat16, torch.float16) if cuda else (torch.float32,)
    for dtype in dtypes if not options.tiny else ():
        options.rows.add("ceiling", dtype=str(dtype).removeprefix("torch."), **roof(dtype, options.device))


if __name__ == "__main__":
    main()
