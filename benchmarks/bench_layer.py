"""layer under pytest-benchmark; cases and candidates are defined in rf_kernels/bench/layer.py.

pytest benchmarks/bench_layer.py --benchmark-only
python -m rf_kernels.bench --op layer         # the same cases, candidates in turn, with ratios
"""

from rf_kernels.bench import layer

CASES = layer.cases()


def test_layer(run_case, case, name):
    run_case(case, name)
