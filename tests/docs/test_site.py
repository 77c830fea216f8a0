"""The site: it builds without a warning, reads without a network, and has every public name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import fastedit
from fastedit import losses
from fastedit.cli.main import app
from fastedit.methods import METHODS, OBJECTIVES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


#: The elements of a page that reach beyond the screen, up to five.
WIDEST = """[...document.querySelectorAll("article *")].filter(each => each.getBoundingClientRect().right > 501)
    .slice(0, 5).map(each => each.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a dead link, a page that is in no menu or a name that is not there stops the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder


class _Loaded(HTMLParser):
    """What a page loads by itself: links that a reader follows are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get("src") or (given.get("href") if tag == "link" else None)
        if address and given.get("rel") != "canonical":
            self.addresses.append(address)


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        if page.name == "404.html":
            continue  # of web servers, which give it an address of their own
        parser = _Loaded()
        parser.feed(page.read_text(encoding="utf-8"))
        for address in parser.addresses:
            assert not re.match(r"(https?:)?//", address), f"{page.relative_to(site)} loads {address}"
            if not address.startswith("data:"):
                assert (page.parent / address.split("?")[0]).exists(), f"{page.relative_to(site)}: {address}"


def test_pages_fit_a_narrow_screen(browser: Any, site: Path) -> None:
    """Only what scrolls by itself, such as a table or code, is wider than the screen."""
    tab = browser.new_page(viewport={"width": 500, "height": 900})
    wide = {}
    for page in sorted(site.rglob("*.html")):
        if page.name == "404.html":
            continue
        tab.goto(page.as_uri())
        width = tab.evaluate("document.documentElement.scrollWidth")
        if width > 500:
            wide[str(page.relative_to(site))] = (width, tab.evaluate(WIDEST))
    tab.close()
    assert wide == {}


def test_the_reference_has_every_public_name(site: Path) -> None:
    api = (site / "reference" / "api.html").read_text(encoding="utf-8")
    absent = [
        name for name in fastedit.__all__ if name not in ("ops", "__version__") and f'id="fastedit.{name}"' not in api
    ]
    assert absent == []
    ops = (site / "reference" / "ops.html").read_text(encoding="utf-8")
    functions = [name for name in fastedit.ops.__all__ if inspect.isroutine(getattr(fastedit.ops, name))]
    names = [f"ops.{name}" for name in functions if name != "implementations"]  # that is a name of fastedit itself
    names += [f"losses.{name}" for name in losses.__all__]
    assert [name for name in names if f'id="fastedit.{name}"' not in ops] == []


def test_the_reference_has_every_config(site: Path) -> None:
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    configs = [method.Config for method in METHODS.values()] + [OBJECTIVES[name].config for name in ("kl", "odedit")]
    assert [config.__name__ for config in configs if f'.{config.__name__}"' not in settings] == []


def test_the_reference_has_every_command() -> None:
    written = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    commands = [command.name or command.callback.__name__ for command in app.registered_commands if not command.hidden]
    assert len(commands) > 10
    assert [name for name in commands if f"| `fastedit {name}` |" not in written] == []


def test_messages_of_the_page_of_errors_are_in_the_code() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastedit").rglob("*.py"))
    # a message is written in several strings, one a line
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    rows = re.findall(r"^\| `(.+?)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) > 25
    absent = [(part.strip(), row) for row in rows for part in row.split("…") if part.strip() not in code]
    assert absent == []
