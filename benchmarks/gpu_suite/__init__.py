"""Everything that a GPU has to say about this library, in one command of a few minutes.

    python -m benchmarks.gpu_suite --out DIR              tests, benchmarks, report.json, pictures
    python -m benchmarks.gpu_suite --out DIR --sanitizer  and compute-sanitizer over a few tests
    python -m benchmarks.gpu_suite --out DIR --dry-run    the same code on the CPU with tiny shapes

Every stage is a process of its own with a time limit of its own, so that a kernel that takes the CUDA context
with it, or hangs, costs its stage alone; results are on disk as soon as they exist. Without a GPU it says so,
runs the functional model's cases of the Hopper kernel where that model is built, and exits with 0.
docs/gpu.md tells what is measured, and how.
"""

#: Version of the report's layout.
SCHEMA = 1
