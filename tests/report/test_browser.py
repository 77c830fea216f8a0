"""Pages in a headless Chromium, on a wide and a narrow screen."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastedit.report import comparison_page, run_page, write_page
from tests.report.conftest import HOSTILE, record_of, some_requests

WIDTHS = (1400, 500)
SCREENSHOTS = os.environ.get("FASTEDIT_SCREENSHOTS")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a run whose texts are hostile, and one that compares."""
    folder = tmp_path_factory.mktemp("pages")
    plain = some_requests(6)
    requests = [replace(plain[0], prompt=HOSTILE, target=HOSTILE, id=HOSTILE), *plain[1:]]
    record = record_of(requests, failing=[0, 3], checkpoints=True)
    runs = {"lora": record_of(plain, failing=[1, 2], method="lora"), "odedit+lora": record_of(plain, failing=[1])}
    return {
        "run": write_page(folder / "run.html", run_page(record, requests)),
        "comparison": write_page(folder / "comparison.html", comparison_page(runs, plain)),
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_page_fits_the_screen_and_complains_of_nothing(
    kind: str, width: int, browser: Any, pages: dict[str, Path]
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    requested: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(pages[kind].as_uri())
    assert complaints == []
    assert [url for url in requested if not url.startswith("data:")] == [pages[kind].as_uri()]
    assert tab.title().startswith(("4 of 6 edits of pocket-llava hold", "6 edits of pocket-llava, made in 2 ways"))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("h1").bounding_box()["width"] > 300
    tab.locator("details").first.evaluate_all("all => all.forEach(each => each.open = true)")
    picture = tab.screenshot(full_page=True)
    assert picture.startswith(b"\x89PNG")
    if SCREENSHOTS:
        Path(SCREENSHOTS, f"{kind}-{width}.png").write_bytes(picture)
    tab.close()


def shown(tab: Any) -> list[str]:
    """Numbers of the edits that are to be seen."""
    return [text.split(" ")[0] for text in tab.locator(".card:visible header .note").all_inner_texts()]


def test_filters_show_what_failed(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    tab.goto(pages["run"].as_uri())
    assert shown(tab) == ["1", "2", "3", "4", "5", "6"]
    tab.get_by_role("button", name="failed somewhere").click()
    assert shown(tab) == ["1", "4"]
    assert tab.locator("[data-shown]").inner_text() == "2"
    tab.get_by_role("searchbox").fill("number 3")
    assert shown(tab) == ["4"]
    tab.get_by_role("button", name="all", exact=True).click()
    tab.get_by_role("searchbox").fill("")
    assert len(shown(tab)) == 6
    tab.goto(pages["comparison"].as_uri())
    tab.get_by_role("button", name="methods disagree").click()
    assert shown(tab) == ["3"]
    tab.close()


def test_hostile_text_is_shown_and_not_run(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    tab.goto(pages["run"].as_uri())
    assert tab.title() != "owned"
    assert tab.locator("img").count() == 0
    assert tab.locator(".card b.text").first.inner_text() == HOSTILE
    # Were something let through, the policy would still refuse to run it
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    tab.wait_for_timeout(50)
    assert tab.title() != "1"
    tab.close()


def test_a_page_is_whole_without_scripts(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(pages["run"].as_uri())
    assert len(shown(tab)) == 6
    assert not tab.locator(".filters").is_visible()
    tab.close()
