"""A page as a file."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from fastedit.report import run_page, write_page
from tests.report.conftest import record_of, some_requests


def test_the_policy_names_the_one_script_of_the_page() -> None:
    page = run_page(record_of(some_requests()))
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_a_page_loads_nothing() -> None:
    page = run_page(record_of(some_requests()), some_requests())
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert not re.search(r"url\((?!data:image/)", page)
    assert "@import" not in page


def test_writing_replaces_what_is_there_and_bears_broken_text(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_page(path, "new \ud800")
    assert path.read_text() == "new ?"
    with pytest.raises(OSError, match="absent"):
        write_page(tmp_path / "absent" / "report.html", "new")
