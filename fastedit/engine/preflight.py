"""Everything in the records that can end a run, found before any work and told at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fastedit.backbone import EditableModel, ImageInputs
from fastedit.backbone.encoding import SPECIAL_RULE, RowError, position_limit, row_tokens, special_token
from fastedit.data.check import EditProblems, ImageLooks
from fastedit.data.problems import ImageError, Problem, RecordErrors
from fastedit.deltas.install import PLACEHOLDER
from fastedit.engine.asked import AskedPart, asked_parts
from fastedit.fitting.views import ViewSource
from fastedit.methods import EditPlan
from fastedit.methods.base import Method, check_behind_encoder, is_computed
from fastedit.requests import EditRequest, Query
from fastedit.visuals import ImageSource, Video, image_places

#: Tokens that are kept free behind a question of a method that puts text before it: as many as answers are written of.
ANSWER_ROOM = 48
# Texts tokenised at a time; and tokens that two texts may have more when they are joined, and none that are near it
_TEXTS, _SLACK = 8192, 16


@dataclass(frozen=True)
class Context:
    """What a method puts before every question once an edit is made.

    Args:
        method: its name. text: of an edit. told_as: what that is, in words. room: tokens kept free for an answer.
    """

    method: str
    text: Callable[[EditRequest], str]
    told_as: str
    room: int

    @staticmethod
    def of(plan: EditPlan) -> Context | None:
        """That of a method that asks other questions than it is asked; None of all others."""
        if plan.method.context is Method.context:
            return None
        room = getattr(plan.config, "answer_room", ANSWER_ROOM)
        text = partial(plan.method.context, plan.config)
        return Context(plan.name.rpartition("+")[2], text, plan.method.context_is, room)


def check_run(
    model: EditableModel,
    edits: Sequence[EditRequest],
    plan: EditPlan,
    views: ViewSource,
    *,
    evaluate: bool,
    mode: str,
) -> None:
    """Refuse records that a run would stop at.

    Args:
        model: frozen; only its processor and configuration are used. edits: of the run. plan: of the method.
        views: what the edits are fitted on. evaluate: whether they are scored. mode: "single" or "sequential".
    Raises:
        ValueError: a method that looks for prompts among the decoder's tokens, of a model whose encoder reads them.
        RecordErrors: every problem of the edits and of the pool, each with its place and id.
    """
    check_behind_encoder(model, plan)
    roles = plan.build_objective(plan.method.solver(model, plan.config).steps).roles
    fitted = len(roles) > 1 and not is_computed(plan.method)
    context, rows = Context.of(plan), Rows(model)
    problems = rows.problems(
        edits, lambda edit: asked_parts(edit, fitted=fitted, scored=evaluate, predicted=fitted and views.own),
        context=context, shared=mode == "sequential",
    )  # fmt: skip
    if not views.own and ((fitted and views.source == "heldout") or plan.method.setup is not Method.setup):
        problems += rows.problems(
            views.pool, lambda edit: asked_parts(edit, fitted=True, scored=False, predicted=True), name="pool"
        )
    if not problems and fitted and rows.crowded():
        found = EditProblems(edits)
        for number in range(len(edits)):
            for view in views.views(number, roles):
                rows.query(found, number, view.query)
        problems = found.problems
    if problems:
        raise RecordErrors(problems)


def check_training(model: EditableModel, records: Sequence[EditRequest], plan: EditPlan) -> None:
    """Refuse records that training would stop at; any question may be asked about any image there.

    Raises:
        RecordErrors: every problem, each with its place and id.
    """
    check_behind_encoder(model, plan)
    context, rows = Context.of(plan), Rows(model)

    def parts(edit: EditRequest) -> Iterator[AskedPart]:
        return asked_parts(edit, fitted=True, scored=True, predicted=True)

    problems = rows.problems(records, parts, name="records", context=context, shared=True)
    if not problems and rows.crowded():
        problems = rows.problems(records, parts, name="records", context=context, shared=True, crossed=True)
    if problems:
        raise RecordErrors(problems)


def record_problems(
    model: EditableModel, edits: Sequence[EditRequest], *, images: bool = True, scored: bool = True
) -> list[Problem]:
    """Return everything that a model cannot be asked of some edits, whatever the method.

    Args:
        model: with or without weights. images: whether they are opened; else each counts as the smallest.
        scored: False looks at the edits' own questions alone.
    """
    return Rows(model, images=images).problems(edits, lambda edit: asked_parts(edit, fitted=scored, scored=scored))


class _Record:
    """An edit whose problems are collected, each field's once."""

    def __init__(self, found: EditProblems, number: int) -> None:
        self._found, self._number = found, number
        self.named: set[str] = set()

    def add(self, field: str, rule: str, value: object = None) -> None:
        """Add a problem of a field."""
        if field not in self.named:
            self.named.add(field)
            self._found.add(self._number, field, rule, value)

    def add_image(self, field: str, error: ImageError, source: ImageSource) -> None:
        """Add what is wrong with an image, in the first field that it stands in."""
        key = str(ImageLooks.key(source))
        if not self.named & {field, key}:
            self.named |= {field, key}
            self._found.add_error(self._number, field, error, source)


class Rows:
    """What the rows of some edits would be, and why there can be none; no image and no row is kept.

    Texts are tokenised once each, many at a time, and lengths added up; a row is only made where the sum is near the
    model's limit.

    Args:
        model: with or without weights. images: whether images are opened.
    """

    def __init__(self, model: EditableModel, *, images: bool = True) -> None:
        self.model, self.limit = model, position_limit(model)
        self._looks = ImageLooks(model.images.size) if images else None
        self._counts: dict[str, int] = {"": 0}
        self._special: dict[str, str] = {}
        self._around: dict[tuple[int, bool], int] = {}
        self._longest = {"prompt": 0, "image": 0, "answer": 0, "context": 0}

    def problems(
        self,
        edits: Sequence[EditRequest],
        parts: Callable[[EditRequest], Iterable[AskedPart]],
        *,
        name: str = "edits",
        context: Context | None = None,
        shared: bool = False,
        crossed: bool = False,
    ) -> list[Problem]:
        """Return the problems of some edits.

        Args:
            edits: to look at. parts: their questions. name: of the list. context: text before an edit's questions.
            shared: it may stand before those of others. crossed: any question may be asked about any image.
        """
        found = EditProblems(edits, name)
        asked = [list(parts(edit)) for edit in edits]
        before = ["" if context is None else context.text(edit) for edit in edits]
        self._read(itertools.chain(before, *((part.prompt, part.answer or "") for listed in asked for part in listed)))
        longest = max(before, key=self._counts.__getitem__, default="") if shared else ""
        for number, listed in enumerate(asked):
            record = _Record(found, number)
            if context is not None and PLACEHOLDER in before[number]:
                record.add("prompt", f"{context.method}: an edit's text does not hold {PLACEHOLDER!r}", before[number])
            for part in listed:
                shown = self._looked(record, part)
                if shown is None or not self._spelled(record, part):
                    continue
                if crossed and part.image is not None:
                    shown = self._longest["image"]
                self._fits(record, part, shown, longest or before[number], context)
        return found.problems

    def query(self, found: EditProblems, number: int, query: Query) -> None:
        """Add what is wrong with a view of an edit."""
        part = AskedPart("views", query.prompt, "views", query.image, "views", query.answer)
        self._read((query.prompt, query.answer or ""))
        record = _Record(found, number)
        shown = self._looked(record, part)
        if shown is not None and self._spelled(record, part):
            self._fits(record, part, shown, "", None)

    def crowded(self) -> bool:
        """Whether the longest texts and the largest image of all that was looked at do not fit into one row."""
        return self.limit is not None and sum(self._longest.values()) + self._overhead(1) > self.limit

    def _read(self, texts: Iterable[str]) -> None:
        """Tokenise texts that are new."""
        new = [text for text in dict.fromkeys(texts) if text not in self._counts]
        for start in range(0, len(new), _TEXTS):
            chunk = new[start : start + _TEXTS]
            rows = self.model.tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            for text, ids in zip(chunk, rows, strict=True):
                self._counts[text] = len(ids)
                special = special_token(self.model, ids)
                if special:
                    self._special[text] = special

    def _looked(self, record: _Record, part: AskedPart) -> int | ImageInputs | None:
        """Tokens of the image of a question, 0 without one, or what stands for a list or a video.

        None after adding what is wrong with any of it.
        """
        if part.image is None:
            return 0
        reader = self.model.images
        reason = reader.refusal(part.image)
        if reason:
            record.add(part.shown, reason)
            return None
        several, places = isinstance(part.image, (tuple, Video)), list(image_places(part.image))
        if self._looks is None:
            return reader.smallest(part.image) if several else 1
        looks = [self._looks.at(source) for _, source in places]
        for look, (place, source) in zip(looks, places, strict=True):
            if isinstance(look, ImageError):
                record.add_image(part.shown + place, look, source)
        sizes = [look for look in looks if not isinstance(look, ImageError)]
        if len(sizes) < len(looks):
            return None
        try:
            return reader.shape(part.image, sizes) if several else reader.tokens(sizes[0])
        except ImageError as error:
            record.add_image(part.shown, error, places[0][1])
            return None

    def _spelled(self, record: _Record, part: AskedPart) -> bool:
        """Whether question and answer are text; adds what is wrong with them."""
        unknown = self.model.tokenizer.unk_token
        for field, text in ((part.field, part.prompt), (part.answer_field, part.answer)):
            special = self._special.get(text or "", "")
            # A character that the model does not know can be asked about, and not be answered
            if special and (field == part.answer_field or special != unknown):
                record.add(field, f"{SPECIAL_RULE} ({special!r})", text)
        return not record.named & {part.field, part.answer_field}

    def _fits(
        self, record: _Record, part: AskedPart, seen: int | ImageInputs, before: str, context: Context | None
    ) -> None:
        """Add that a row cannot be made, by itself or behind the text of an edit."""
        several = seen.each if isinstance(seen, ImageInputs) else ()
        tokens = seen if isinstance(seen, int) else sum(len(each.expansion) or each.tokens for each in several)
        sizes = {
            "prompt": self._counts[part.prompt],
            "image": tokens,
            "answer": self._counts[part.answer or ""],
            "context": self._counts[before],
        }
        self._longest = {name: max(size, sizes[name]) for name, size in self._longest.items()}
        room = 0 if context is None else context.room
        count = 0 if part.image is None else max(1, len(several))
        near = (
            self._overhead(count, video=any(each.video for each in several))
            + sum(sizes.values())
            + max(0, room - sizes["answer"])
        )
        if sizes["prompt"] and (self.limit is None or near <= self.limit):
            return
        shown = None if part.image is None else seen
        try:
            ids, _, length = row_tokens(self.model, part.prompt, shown, part.answer)
        except RowError as error:
            answered = error.part == "answer" or sizes["answer"] > sizes["prompt"]
            record.add((answered and part.answer_field) or part.field, str(error))
            return
        if context is not None and self.limit is not None and "context" not in record.named:
            wanted = max(room, len(ids) - length)
            try:
                length = row_tokens(self.model, before + part.prompt, shown, None)[2]
                if length + wanted > self.limit:
                    raise RowError("prompt", f"a row may have at most {self.limit} tokens", f"{length} and {wanted}")
            except RowError as error:
                record.named.add("context")
                record.add(
                    part.field, f"{context.method}: {context.told_as} and its question fit into a prompt; {error}"
                )

    def _overhead(self, images: int, *, video: bool = False) -> int:
        """Tokens of a row besides those of its question, its images and its answer, and some more."""
        if (images, video) not in self._around:
            text = self.model.prompts.text("a", images > 0, images=images, video=video)
            self._around[images, video] = len(self.model.prompts.ids(text)) + 1 + _SLACK
        return self._around[images, video]
