"""``fastedit check``: everything that is wrong with records, before any work."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from fastedit.data import EMBEDDED, EditList, Problem, RecordErrors, check_images, detect, report
from fastedit.data.images import check_image
from fastedit.data.reader import collect_edits
from fastedit.requests import ImageSource


def check_file(
    console: Console,
    messages: Console,
    data: str,
    *,
    format: str | None = None,
    images: Path | None = None,
    skip_missing: bool = False,
    model: str | None = None,
    template: str | None = None,
) -> bool:
    """Tell what is wrong and what is odd in records; return whether nothing is wrong.

    Args:
        console: for what was found. messages: for what is wrong, all of it, one line each.
        data: a file of records, or an embedded set. format, images, skip_missing: as ``read_edits`` takes them.
        model: whose texts, lengths and image shapes the records must be; no weights are read.
        template: of its prompts.
    """
    if Path(data).is_file():
        console.print(str(detect(data)), soft_wrap=True, markup=False)
    edits, problems = collect_edits(data, format=format, images=images, skip_missing=skip_missing)
    console.print(f"{len(edits)} records read", markup=False)
    looked = images is not None or data in EMBEDDED
    if model is not None:
        problems += _of_model(console, model, edits, template, looked=looked)
    elif looked:
        problems += _of_images(console, edits)
    if not looked:
        console.print("images were not looked at: say with --images where they are", markup=False)
    wrong = [problem for problem in problems if problem.level == "error"]
    if edits and not wrong:
        console.print(str(report(edits)), soft_wrap=True, markup=False)
    for problem in problems:
        if problem.level != "error":
            messages.print(f"warning: {problem}", soft_wrap=True, markup=False, highlight=False)
    if not wrong:
        return True
    messages.print(f"fastedit: {str(RecordErrors(wrong)).splitlines()[0]}", style="red", markup=False, soft_wrap=True)
    for problem in wrong:
        messages.print(f"  {problem}", style="red", markup=False, soft_wrap=True, highlight=False)
    return False


def _of_images(console: Console, edits: EditList) -> list[Problem]:
    """Problems of the images alone; says how many there are."""
    started, counted = time.perf_counter(), 0

    def size(source: ImageSource) -> tuple[int, int]:
        nonlocal counted
        counted += 1
        return check_image(source)

    problems = check_images(edits, size=size)
    console.print(f"{counted} images looked at in {time.perf_counter() - started:.1f} s", markup=False)
    return problems


def _of_model(console: Console, model: str, edits: EditList, template: str | None, *, looked: bool) -> list[Problem]:
    """Problems of images, texts and lengths; says what the lengths were held against."""
    from fastedit.backbone.encoding import position_limit
    from fastedit.backbone.synthetic.skeleton import skeleton
    from fastedit.engine.preflight import record_problems

    started = time.perf_counter()
    shaped, _ = skeleton(model, template=template)
    loaded = time.perf_counter()
    problems = record_problems(shaped, edits, images=looked)
    limit = position_limit(shaped)
    held = f"texts{' and images' if looked else ''} as {model} takes them, in rows of at most {limit} tokens"
    spent = time.perf_counter() - loaded
    console.print(f"{held}: looked at in {spent:.1f} s (and {loaded - started:.1f} s for the processor)", markup=False)
    return problems
