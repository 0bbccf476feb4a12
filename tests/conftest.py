"""Triton's kernels run on the GPU where there is one, and in Triton's interpreter elsewhere."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Read when the kernels are first imported, so it must be set before any test is.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # One thread for each of the processes: together they have no more cores than that, and threads
    # that wait for a core hold up all others.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same examples on every run, so that a change is judged by what it changes; for others and
# more of them: pytest --hypothesis-profile=explore
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory):
    """No test reads or writes the user's cache, and neither do the commands it starts."""
    previous = os.environ.get("FSA_CACHE_DIR")
    os.environ["FSA_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if previous is None:
        del os.environ["FSA_CACHE_DIR"]
    else:
        os.environ["FSA_CACHE_DIR"] = previous


@pytest.fixture
def count_calls():
    """Of a list of modules, the numbers of those that are called from now on, in a list."""
    hooks = []

    def count(modules):
        calls = []
        hooks.extend(
            module.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
            for number, module in enumerate(modules)
        )
        return calls

    yield count
    for hook in hooks:
        hook.remove()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    from fsa.cli import app as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fsa", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
