"""What every test gets: few threads, a temporary home for caches, no network; GPU tests skipped with their reason."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# One home per test run, set before any library reads it: nothing of the user's caches or settings leaks in or out.
_HOME = Path(tempfile.mkdtemp(prefix="mmi-tests-"))
for _name, _folder in {"HOME": "", "XDG_CACHE_HOME": "cache", "HF_HOME": "huggingface", "MPLCONFIGDIR": "mpl"}.items():
    os.environ[_name] = str(_HOME / _folder)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "2")
for _name in [name for name in os.environ if name.startswith("MMI_")]:
    del os.environ[_name]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Small tensors gain nothing from many threads, and a shared machine loses."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module", autouse=True)
def own_accelerator() -> Iterator[None]:
    """accelerate settles the precision of a process once; every file of tests chooses anew."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


FORKING = ("test_run_directory.py", "test_run_kill.py", "test_train_data.py", "test_train_packing.py")
"""Their tests fork this very process, which cannot be done once its heap has grown beyond the machine's memory."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first; skip what is marked `gpu` where there is no CUDA device, saying so."""
    items.sort(key=lambda item: item.path.name not in FORKING)  # stable: the order is otherwise kept
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_sessionfinish() -> None:
    import shutil

    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Registers and spilled bytes of the CUDA kernels, where ptxas could tell them, and errors of all kernels."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties if report.when == "call" else ():
            if name in ("registers", "errors"):
                terminalreporter.write_line(f"{'ptxas sm_90' if name == 'registers' else 'error'}: {value}")
