"""Fixtures of all tests."""

import os
import signal

import pytest
import torch

pytest.register_assert_rewrite("helpers", "chip.harness")
if os.environ.get("TRITON_INTERPRET") == "1":
    import helpers.quick_interpreter  # noqa: F401

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in jobs in the background: Ctrl-C is tested too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # the processes share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))

_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=_GPU)]


@pytest.fixture(params=DEVICES)
def device(request):
    """A test that takes it runs on the CPU, which proves the test, and on a CUDA device where there is
    one."""
    return request.param


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.heavy), DEVICES[1]])
def matrix_device(request):
    """The same for large sets of cases: on the CPU they belong to the heavy run."""
    return request.param


def _threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """``torch.set_num_threads``; the number is what it was when the test is over."""
    yield from _threads()


@pytest.fixture(scope="module")
def threads_of_module():
    """The same, for all tests of a module and the fixtures that they share."""
    yield from _threads()


@pytest.fixture
def one_thread(threads):
    """For tests on tiny tensors: starting threads would cost more than it saves, and no bit depends on it."""
    threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """With RF_BACKEND=triton the same tests run on Triton, but for what it does not serve."""
    try:
        return (yield)
    except RuntimeError as error:
        if "Triton is asked for and cannot serve: float64" in str(error):
            pytest.skip("Triton does not serve float64")
        raise


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    """A kernel that wrote out of bounds takes the CUDA context with it: every later test would fail for its
    sake."""
    if item.get_closest_marker("gpu") and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(
                f"the CUDA context was lost in {item.nodeid}: {str(error).splitlines()[0]}", returncode=3
            )
