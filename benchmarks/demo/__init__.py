"""`make demo`: a stream from a checkpoint beside the published path, and a report on both (``python -m
benchmarks.demo``)."""
