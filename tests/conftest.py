"""What every test shares: fresh tensors hold NaN, and an implementation that is missing says so."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton decides when a kernel is imported whether to interpret it: without a GPU that is the only way to run one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastedit.testing import Provider


def pytest_configure(config: pytest.Config) -> None:
    """Folders of tests lie in memory where the system has room there: what waits for a disk is most of some tests."""
    gc.disable()
    memory = Path("/dev/shm")
    if config.option.basetemp is None and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 8 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first, so that no processor waits for the last of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections of garbage: a million objects that stay."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that reading or returning unwritten memory shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: playwright's own or one on the path."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = str(own) if own.exists() else next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
        if path is None:
            pytest.skip("no Chromium: playwright install chromium, or a chromium on the path")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def available() -> Callable[[Provider], Provider]:
    """Return a function that skips with the reason, or fails where FASTEDIT_EXPECT names the implementation."""

    def check(provider: Provider) -> Provider:
        if provider.missing:
            expected = os.environ.get("FASTEDIT_EXPECT", "").split(",")
            if provider.id in expected:
                pytest.fail(f"{provider.op}: {provider.id} is expected here but {provider.missing}")
            pytest.skip(f"{provider.op}: {provider.id}: {provider.missing}")
        return provider

    return check
