"""Edits with their views as training examples for the next fine-tuning, and as tests for any checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.backbone.prompts import chat
from fastedit.data.images import locate, open_file, open_image, store_image
from fastedit.data.jsonl import write_jsonl
from fastedit.data.schema import MEMBER_FIELDS, to_json, write_text
from fastedit.deltas import EditDelta
from fastedit.engine.acting import applied
from fastedit.evaluation import HELD_OUT, EvaluationView, evaluation_views, exact_match
from fastedit.export import Exported
from fastedit.export.placing import placing
from fastedit.export.regression import TEST_FILE, program_text
from fastedit.requests import EditRequest, ImageSource, Video, VisualSource, images_of
from fastedit.settings import nearest
from fastedit.visuals import with_images

#: What ``format`` may be.
FORMATS = ("chat", "tests")
EDITS, EXAMPLES, QUESTIONS, IMAGES = "edits.jsonl", "train.jsonl", "questions.json", "images"
#: Endings of the image files that are copied as they are, by how they begin.
_ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


@dataclass(frozen=True)
class Example:
    """One question with the answer that a model should give.

    Args:
        edit: id of the edit. number: of the edit. view: the question, what it counts for, and whether it must change.
        answer: the target, or what the base model answers.
    """

    edit: str
    number: int
    view: EvaluationView
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether it only measures: wordings and paraphrases that nothing may be trained on."""
        return self.view.score in HELD_OUT

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Question and answer as chat templates take them, {"type": "image"} in the place of every image."""
        visual = self.view.query.image
        count = 1 if isinstance(visual, Video) else len(images_of(visual))
        asked = chat(self.view.query.prompt, with_image=count > 0, images=count, video=isinstance(visual, Video))
        return [*asked, {"role": "assistant", "content": [{"type": "text", "text": self.answer}]}]


def export_records(
    model: EditableModel,
    deltas: Sequence[EditDelta],
    folder: Path,
    *,
    requests: Sequence[EditRequest] = (),
    format: str = "chat",
    check_sequence: bool = True,
    max_new_tokens: int = 48,
    overwrite: bool = False,
) -> Exported:
    """Write every edit with its views, and the images that they are about.

    Questions that must change have the answer that follows from the edit; those that must stay have what the base
    model answers, asked now. What is for training has no wording that is held out (``fastedit.evaluation.HELD_OUT``);
    tests ask those as well. Both formats hold ``images/`` and ``edits.jsonl``, which ``fastedit.read_edits(file,
    images=folder)`` reads back.

    Args:
        model: the base. deltas: of any kind. folder: new or empty. requests: of the deltas, in order; needed.
        format: "chat" writes ``train.jsonl``, a line an example: "messages" for ``apply_chat_template``, "images" in
            order of their places (of a video its frames, with "fps"), "edit", "score" and "changes". "tests" writes
            ``questions.json`` and ``test_edits.py``, which asks any checkpoint through transformers alone
            (``CHECKPOINT=folder pytest``); what the edited model does not answer so is expected to fail.
        check_sequence: as for ``export_merged``, of what is asked for "tests".
        max_new_tokens: longest answer that is asked for. overwrite: an earlier export in the folder is replaced.
    Returns:
        Its report: "edits", "examples", "skipped" questions that the base answers with nothing; for training
        "held_out" questions, and for tests "held" ones.
    Raises:
        ValueError: no requests, another format, or a folder in use.
        ImageError: an image cannot be read. OSError: it cannot be written; nothing is left of it.
    """
    if not requests:
        raise ValueError("export: 'records' needs the requests of the deltas (got requests=())")
    if format not in FORMATS:
        raise ValueError(f"export: format {format!r} is not known{nearest(format, FORMATS)} (got format={format!r})")
    with placing(folder, "records", overwrite=overwrite) as placement:
        stored = [_stored(request, placement.path) for request in requests]
        write_jsonl(stored, placement.path / EDITS, images=placement.path)
        asked = list(examples(requests, model, max_new_tokens=max_new_tokens))
        # The same questions, with the paths of the stored images
        written = list(_views(stored))
        placement.report |= {"edits": [delta.request_id for delta in deltas], "format": format}
        both = [(example, view) for example, (_, view) in zip(asked, written, strict=True)]
        if format == "chat":
            asked_of_all = len(both)
            both = [(example, view) for example, view in both if not example.held_out]
            placement.report["held_out"] = asked_of_all - len(both)
        kept = [(example, view) for example, view in both if example.answer]
        placement.report |= {"examples": len(kept), "skipped": len(both) - len(kept)}
        if format == "chat":
            lines = [to_json(_line(example, view.query.image)) + "\n" for example, view in kept]
            write_text(placement.path / EXAMPLES, "".join(lines))
        else:
            with applied(model, deltas, check_sequence=check_sequence):
                queries = [example.view.query for example, _ in kept]
                answers = model.generate(queries, max_new_tokens=max_new_tokens)
            questions = [
                _question(model, example, view.query.image, exact_match(answer, example.answer))
                for (example, view), answer in zip(kept, answers, strict=True)
            ]
            content = {"max_new_tokens": max_new_tokens, "questions": questions}
            write_text(placement.path / QUESTIONS, to_json(content))
            write_text(placement.path / TEST_FILE, program_text())
            placement.report["held"] = sum(question["holds"] for question in questions)
    return placement.exported


def examples(
    requests: Iterable[EditRequest], model: EditableModel | None = None, *, max_new_tokens: int = 48
) -> Iterator[Example]:
    """Yield every view of edits with its answer: the target, or of what must stay the base model's own.

    Args:
        requests: edits. model: the base, which is asked; without one the answers of the records stand, "" where there
            is none. max_new_tokens: longest answer that is asked for.
    """
    listed = list(requests)
    views = list(_views(listed))
    staying = [view.query for _, view in views if not view.changes]
    answers = iter([] if model is None else model.generate(staying, max_new_tokens=max_new_tokens))
    for number, view in views:
        answer = view.query.answer or ""
        if not view.changes and model is not None:
            answer = next(answers)
        yield Example(listed[number].id, number, view, answer.strip())


def dataset(
    requests: Iterable[EditRequest], processor: Any = None, *, model: EditableModel | None = None, **options: Any
) -> Any:
    """Return edits with their views as a ``datasets.Dataset``, to be mixed into a fine-tuning.

    Columns: "messages", "images" (PIL), "edit", "score", "changes"; with a processor "text", rendered by its chat
    template. Questions without an answer are left out, and wordings that are held out.

    Args:
        requests: edits. processor: with a chat template, or None.
        model: the base, for what must stay; see ``examples``.
        options: "max_new_tokens".
    Raises:
        ImportError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("dataset: the package datasets is needed (pip install datasets)") from error
    rows = []
    for example in examples(requests, model, **options):
        if not example.answer or example.held_out:
            continue
        images = [open_image(source) for source in images_of(example.view.query.image)]
        row = {"messages": example.messages, "images": images, "edit": example.edit, "score": example.view.score}
        row["changes"] = example.view.changes
        if processor is not None:
            row["text"] = processor.apply_chat_template(example.messages, tokenize=False)
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def _views(requests: Iterable[EditRequest]) -> Iterator[tuple[int, EvaluationView]]:
    for number, request in enumerate(requests):
        for view in evaluation_views(request):
            yield number, view


def _line(example: Example, visual: VisualSource | None) -> dict[str, Any]:
    line = {"messages": example.messages, "images": [str(path) for path in images_of(visual)], "edit": example.edit}
    line |= {"score": example.view.score, "changes": example.view.changes}
    return line | ({"fps": visual.fps} if isinstance(visual, Video) else {})


def _question(model: EditableModel, example: Example, visual: VisualSource | None, holds: bool) -> dict[str, Any]:
    video = isinstance(visual, Video)
    count = 1 if video else len(images_of(visual))
    text = model.prompts.text(example.view.query.prompt, count > 0, images=max(1, count), video=video)
    return {
        "edit": example.edit,
        "score": example.view.score,
        "prompt": example.view.query.prompt,
        "text": text,
        "images": [str(path) for path in images_of(visual)],
        "video": video,
        "expected": example.answer,
        "changes": example.view.changes,
        "holds": holds,
    }


def _stored(request: EditRequest, folder: Path) -> EditRequest:
    """The request with all its images stored in ``images/`` of a folder, named by their content."""

    def moved(query: Any) -> Any:
        return query if query.image is None else replace(query, image=with_images(query.image, store))

    def store(source: ImageSource) -> ImageSource:
        return _store(source, folder)

    fields: dict[str, Any] = {
        name: with_images(visual, store)
        for name in ("image", "image_rephrase", "image_locality_image")
        if (visual := getattr(request, name)) is not None
    }
    for name in MEMBER_FIELDS:
        fields[name] = tuple(moved(each) for each in getattr(request, name))
    return replace(request, **fields)


def _store(source: ImageSource, folder: Path) -> str:
    if not isinstance(source, str) and not hasattr(source, "__fspath__"):
        (folder / IMAGES).mkdir(exist_ok=True)
        return f"{IMAGES}/{store_image(source, folder / IMAGES)}"
    # What cannot be opened as an image is refused; the file is copied as it is
    open_image(source)
    with open_file(locate(source)) as stream:
        content = stream.read()
    ending = next((end for start, end in _ENDINGS.items() if content.startswith(start)), ".png")
    path = folder / IMAGES / (hashlib.sha256(content).hexdigest()[:32] + ending)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path.relative_to(folder).as_posix()
