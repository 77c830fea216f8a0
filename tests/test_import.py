"""Importing the package is cheap and does nothing but register ops."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastedit


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_pulls_in_no_heavy_package() -> None:
    heavy = ("transformers", "bitsandbytes", "matplotlib", "PIL", "rich", "jinja2")
    assert run(f"import sys, fastedit; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_import_registers_the_ops() -> None:
    assert run("import torch, fastedit; print(torch.ops.fastedit.risk.default is not None)") == "True"


def test_every_public_name_exists() -> None:
    for name in fastedit.__all__:
        assert getattr(fastedit, name) is not None, name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'edti'"):
        fastedit.edti  # noqa: B018
