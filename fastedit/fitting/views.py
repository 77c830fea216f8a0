"""Which questions an edit is fitted on, besides itself: rephrased ones and ones that must not change.

A benchmark's own rephrase and locality questions are its test. Fitting on them measures memory, not editing, so by
default they are not used: rephrased views come from paraphrases that the pool records for the same question and from
small changes to the image, locality views come from the pool (or from the run's other edits).
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageEnhance

from fastedit.data import open_image
from fastedit.data.images import image_key
from fastedit.data.report import question_key
from fastedit.objectives import Role
from fastedit.requests import EditRequest, ImageSource, Query, Video, VisualSource
from fastedit.visuals import with_images

VIEW_SOURCES = ("heldout", "record")
# Used when nothing in the pool paraphrases a question.
WRAPPERS = ("Please answer: {}", "Answer this question. {}", "{} Answer:")


@dataclass(frozen=True)
class TrainingView:
    """One teacher-forced row that an edit is fitted on."""

    role: Role
    query: Query


class ViewSource:
    """Training views of every edit of a run, the same whatever the batch.

    Args:
        edits: the run's edits.
        pool: records that locality views and paraphrases are drawn from; None uses the run's other edits.
        source: "heldout" (never the record's own rephrase or locality fields) or "record" (exactly those).
        near: prefer locality images that are asked the edit's own question (arXiv 2511.13243: edits fire there).
        seed: of the draws; each edit has its own stream.
    Raises:
        ValueError: unknown source; or "heldout" with neither a pool nor other edits to draw from.
    """

    def __init__(
        self,
        edits: Sequence[EditRequest],
        pool: Sequence[EditRequest] | None,
        *,
        source: str = "heldout",
        near: bool = True,
        seed: int = 0,
    ) -> None:
        if source not in VIEW_SOURCES:
            raise ValueError(f"views: source is one of {list(VIEW_SOURCES)} (got views={source!r})")
        self.edits = edits
        self.pool = list(edits if pool is None else pool)
        self.own = pool is None
        self.source = source
        self.near = near
        self.seed = seed
        self._paraphrases: dict[str, list[str]] = defaultdict(list)
        self._by_question: dict[str, list[int]] = defaultdict(list)
        for index, record in enumerate(self.pool):
            question = _normal(record.prompt)
            if record.image is not None:
                self._by_question[question].append(index)
            if record.rephrase is not None:
                self._paraphrases[question].append(record.rephrase)
                self._paraphrases[_normal(record.rephrase)].append(record.prompt)

    def check(self, roles: Sequence[Role]) -> None:
        """Say before any work that locality views cannot be made; warn of views that no edit will have.

        A term of an objective over views that are absent is 0: without a word it would pass for one that is satisfied.

        Raises:
            ValueError: "heldout" locality views with nothing to draw from.
        """
        if (
            self.source == "heldout"
            and any(r > Role.IMAGE_REPHRASE for r in roles)
            and self.own
            and len(self.edits) < 2
        ):
            raise ValueError(
                "views: locality views are drawn from a pool or from other edits; give pool=..., or views='record' to "
                f"use the record's own locality questions (got edits={len(self.edits)}, pool=None)"
            )
        lacking = [role.name.lower() for role in sorted(set(roles)) if not self._can_fill(role)]
        if lacking:
            message = (
                f"views: no record has what {', '.join(lacking)} views are made of; the objective goes without them "
                f"(got views={self.source!r}, edits={len(self.edits)}, pool={None if self.own else len(self.pool)})"
            )
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _can_fill(self, role: Role) -> bool:
        """Whether any edit may have a view of the role."""
        if self.source == "record":
            return any(self._record(edit, role) is not None for edit in self.edits)
        if role is Role.IMAGE_REPHRASE:
            return any(edit.image is not None for edit in self.edits)
        if role is Role.TEXT_LOCALITY:
            return any(_text_locality(record) is not None for record in self.pool)
        if role is Role.IMAGE_LOCALITY:
            drawn = any(_image_locality(record) is not None for record in self.pool)
            return drawn or (self.near and any(r.image is not None and r.prediction for r in self.pool))
        return True

    def views(self, index: int, roles: Sequence[Role]) -> list[TrainingView]:
        """Views of edit number ``index``, sorted by role; a role that cannot be filled is absent.

        Args:
            index: of the edit. roles: of the views; one that is named several times has as many views, all different,
                as far as there are: a record has one of each.
        """
        edit = self.edits[index]
        digest = hashlib.sha256(f"{self.seed}|{edit.prompt}|{edit.target}|{edit.id}".encode()).digest()
        rng = random.Random(digest)
        made: list[TrainingView] = []
        for role in sorted(roles):
            earlier = [view.query for view in made if view.role is role]
            if self.source == "record":
                query = None if earlier else self._record(edit, role)
            else:
                query = self._heldout(edit, index, role, rng, earlier)
            if query is not None:
                made.append(TrainingView(role, query))
        return made

    def _record(self, edit: EditRequest, role: Role) -> Query | None:
        if role is Role.EDIT:
            return Query(edit.prompt, edit.image, edit.target)
        if role is Role.TEXT_REPHRASE:
            return None if edit.rephrase is None else Query(edit.rephrase, edit.image, edit.target)
        if role is Role.IMAGE_REPHRASE:
            return None if edit.image_rephrase is None else Query(edit.prompt, edit.image_rephrase, edit.target)
        return _text_locality(edit) if role is Role.TEXT_LOCALITY else _image_locality(edit)

    def _heldout(
        self, edit: EditRequest, index: int, role: Role, rng: random.Random, earlier: Sequence[Query]
    ) -> Query | None:
        """A view of the role that is none of the earlier ones."""
        if role is Role.EDIT:
            return Query(edit.prompt, edit.image, edit.target)
        if role is Role.TEXT_REPHRASE:
            wording = self._paraphrase(edit, rng, {query.prompt for query in earlier})
            return None if wording is None else Query(wording, edit.image, edit.target)
        if role is Role.IMAGE_REPHRASE:
            return None if edit.image is None else Query(edit.prompt, _shaken(edit.image, rng), edit.target)
        if role is Role.TEXT_LOCALITY:
            return self._draw(_text_locality, index, rng, earlier)
        return self._near(edit, index, rng, earlier) or self._draw(_image_locality, index, rng, earlier)

    def _paraphrase(self, edit: EditRequest, rng: random.Random, earlier: set[str]) -> str | None:
        known = sorted(set(self._paraphrases[_normal(edit.prompt)]) - {edit.prompt, edit.rephrase or ""} - earlier)
        if known:
            return rng.choice(known)
        wrapped = [text for wrapper in WRAPPERS if (text := wrapper.format(edit.prompt)) not in earlier]
        return rng.choice(wrapped) if wrapped else None

    def _near(self, edit: EditRequest, index: int, rng: random.Random, earlier: Sequence[Query]) -> Query | None:
        """The edit's own question about another image of the pool, with that record's answer before its edit."""
        if not self.near:
            return None
        candidates = [i for i in self._by_question[_normal(edit.prompt)] if not (self.own and i == index)]
        for candidate in rng.sample(candidates, len(candidates)):
            record = self.pool[candidate]
            images = (edit.image, *(query.image for query in earlier))
            if record.prediction and not any(_same_image(record.image, image) for image in images):
                return Query(edit.prompt, record.image, record.prediction)
        return None

    def _draw(
        self, part: Callable[[EditRequest], Query | None], index: int, rng: random.Random, earlier: Sequence[Query]
    ) -> Query | None:
        """The given locality question of a random record other than the edit itself, none of the earlier ones."""
        edit = self.edits[index]
        asked_already = (_text_locality(edit), _image_locality(edit), *earlier)

        def of(chosen: int) -> Query | None:
            query: Query | None = part(self.pool[chosen])
            fits = query is not None and not (self.own and chosen == index) and query not in asked_already
            return query if fits and not _asks(query, edit) else None

        for _ in range(64):
            query = of(rng.randrange(len(self.pool)))
            if query is not None:
                return query
        # Few records have such a question, or none has
        found = [query for query in map(of, range(len(self.pool))) if query is not None]
        return rng.choice(found) if found else None


def _text_locality(record: EditRequest) -> Query | None:
    if record.locality_prompt is None or record.locality_answer is None:
        return None
    return Query(record.locality_prompt, None, record.locality_answer)


def _image_locality(record: EditRequest) -> Query | None:
    if record.image_locality_prompt is None or record.image_locality_image is None:
        return None
    if record.image_locality_answer is None:
        return None
    return Query(record.image_locality_prompt, record.image_locality_image, record.image_locality_answer)


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _same_image(a: VisualSource | None, b: VisualSource | None) -> bool:
    return a is b or (a is not None and b is not None and image_key(a) == image_key(b))


def _asks(query: Query | None, edit: EditRequest) -> bool:
    """Whether a question is the edit's own, which is to change: it cannot stand for what must stay."""
    if query is None or question_key(query.prompt) != question_key(edit.prompt):
        return False
    return _same_image(query.image, edit.image)


def _shaken(visual: VisualSource, rng: random.Random) -> VisualSource:
    """A copy of an image, each of a list by itself, all frames of a video alike."""
    state = rng.getstate()

    def shaken(image: ImageSource) -> ImageSource:
        if isinstance(visual, Video):
            rng.setstate(state)
        return jittered(image, rng)

    return with_images(visual, shaken)


def jittered(image: ImageSource, rng: random.Random) -> Image.Image:
    """A slightly cropped, turned and relit copy of an image, the same for the same random state."""
    picture = open_image(image)
    width, height = picture.size
    angle, zoom, light = rng.uniform(-5, 5), rng.uniform(0.92, 1.0), rng.uniform(0.9, 1.1)
    left, top = rng.uniform(0, 1 - zoom) * width, rng.uniform(0, 1 - zoom) * height
    box = (left, top, left + zoom * width, top + zoom * height)
    turned = picture.rotate(angle, resample=Image.Resampling.BILINEAR, fillcolor=_corner(picture))
    cropped = turned.resize((width, height), resample=Image.Resampling.BILINEAR, box=box)
    return ImageEnhance.Brightness(cropped).enhance(light)


def _corner(picture: Image.Image) -> tuple[int, ...]:
    colour = picture.getpixel((0, 0))
    return tuple(int(c) for c in colour) if isinstance(colour, tuple) else (0, 0, 0)
