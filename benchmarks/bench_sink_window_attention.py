"""sink_window_attention under pytest-benchmark; cases and candidates are defined in rf_kernels/bench/sink_window_attention.py.

pytest benchmarks/bench_sink_window_attention.py --benchmark-only
python -m rf_kernels.bench --op sink_window_attention         # the same cases, candidates in turn, with ratios
"""

from rf_kernels.bench import sink_window_attention

CASES = sink_window_attention.cases()


def test_sink_window_attention(run_case, case, name):
    run_case(case, name)
