"""The questions that the disentanglement classifier learns from: what belongs together and what only looks like it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.data.images import image_key
from fastedit.fitting.wordings import reworded
from fastedit.methods.meta.siblings import Classes, normal_words
from fastedit.methods.meta.views import MetaViews
from fastedit.requests import EditRequest, Query, VisualSource
from fastedit.routers.features import PromptTokens, prompt_tokens

#: Under the names of the scores, what an edit is to act on; "both" is the other wording about the other image.
RELATED = ("reliability", "text_generality", "image_generality", "both")
#: and what it is not. What follows from an edit ("portability") is neither.
UNRELATED = ("text_locality", "image_locality", "near", "same", "blind")
#: Rows of one walk.
ROWS = 256


@dataclass(frozen=True)
class Asked:
    """One question of a record.

    Args:
        kind: one of ``RELATED``, ``UNRELATED`` or "portability".
        prompt, image: what is asked. answer: what the unedited model says, where the record knows it.
        means: of a rewording, the question that it puts in other words; "" is the prompt.
    """

    kind: str
    prompt: str
    image: VisualSource | None
    answer: str | None
    means: str = ""


class Questions:
    """All questions of every record, and which of them are the same question or about the same image.

    Wordings that a record gives for one question are one relation, across records; images that a record gives for one
    thing are one entity. Hard negatives are made besides a record's own: its other wording about near images, its other
    image with questions about the first, both wordings without an image.

    Args:
        records: to learn from. seed: of draws where a record lacks a part.
        wordings: rewordings (``fastedit.fitting.wordings``) of what an edit is to act on, and as many of what it is
            not, of every record. siblings: by record, other questions nearly in its words that are asked about its
            image (``siblings_of``).
    """

    def __init__(
        self,
        records: Sequence[EditRequest],
        seed: int = 0,
        wordings: int = 0,
        siblings: Sequence[Sequence[str]] = (),
    ) -> None:
        views = MetaViews(records, seed)
        beside = siblings or [()] * len(records)
        self.of: list[list[Asked]] = [
            _asked(record, views, number, texts)
            for number, (record, texts) in enumerate(zip(records, beside, strict=True))
        ]
        for number, asked in enumerate(self.of):
            asked += _reworded(asked, wordings, random.Random(f"{seed}|{number}|wordings"))
        self._relations, self._entities = Classes(), Classes()
        for asked in self.of:
            known = {one.kind: one for one in asked}
            reliability = known["reliability"]
            for kind in ("text_generality", "image_generality"):
                if kind in known:
                    self._relations.join(_words(reliability), _words(known[kind]))
                    self._entities.join(_picture(reliability.image), _picture(known[kind].image))

    def relation(self, asked: Asked) -> int:
        """Number of the question, whatever its words."""
        return self._relations.number(_words(asked))

    def entity(self, asked: Asked) -> int:
        """Number of what the image shows; -1 without an image."""
        return -1 if asked.image is None else self._entities.number(_picture(asked.image))


def _asked(record: EditRequest, views: MetaViews, number: int, siblings: Sequence[str]) -> list[Asked]:
    now = record.prediction
    # Not as views, which feed some answer where a probe has none
    made = [Asked(probe.kind, probe.prompt, probe.image, probe.answer) for probe in record.probes
            if probe.score in UNRELATED]  # fmt: skip
    probed = {one.kind for one in made}
    for each in views.of(number):
        query = each.view.query
        if each.kind not in probed:
            made.append(Asked(each.kind, query.prompt, query.image, now if each.kind in RELATED else query.answer))
    known = {one.kind: one for one in made}
    prompt = known["text_generality"].prompt if "text_generality" in known else None
    image = known["image_generality"].image if "image_generality" in known else None
    if prompt is not None and image is not None:
        made.append(Asked("both", prompt, image, now))
    if prompt is not None:
        made += [Asked("near", prompt, one.image, one.answer) for one in made if one.kind == "near"]
        if record.image is not None:
            made.append(Asked("blind", prompt, None, None))
    if record.image is not None and "blind" not in known:
        made.append(Asked("blind", record.prompt, None, None))
    # Siblings are known to ask something else; questions of records by lot may not
    if record.image is not None and "same" not in known and not siblings and len(views.records) > 1:
        made += _foreign_questions(record, views, number)
    if image is not None:
        made += [Asked("same", one.prompt, image, one.answer) for one in made if one.kind == "same"]
    made += [Asked("portability", one.prompt, one.image, None) for one in record.portability]
    return [*made, *(Asked("same", text, record.image, None) for text in siblings)]


def _reworded(asked: Sequence[Asked], wordings: int, rng: random.Random) -> list[Asked]:
    """So many rewordings of what an edit is to act on, and of what it is not."""
    related = [one for one in asked if one.kind in RELATED]
    rest = [one for one in asked if one.kind in UNRELATED]
    # Every other one of what is nearest in words: the same image, asked about something else
    nearest = [one for one in rest if one.kind == "same"] or rest
    groups = [related] * wordings + [nearest if number % 2 == 0 else rest for number in range(wordings)]
    # A rewording of the edit itself is another wording of it
    kinds = {"reliability": "text_generality", "image_generality": "both"}
    return [
        Asked(kinds.get(one.kind, one.kind), reworded(one.prompt, rng), one.image, one.answer, one.means or one.prompt)
        for one in (rng.choice(group) for group in groups if group)
    ]


def _foreign_questions(record: EditRequest, views: MetaViews, number: int) -> list[Asked]:
    """Questions of two other records, asked about this one's image."""
    rng = random.Random(f"{views.seed}|{number}|same")
    drawn = rng.sample(range(len(views.records)), min(3, len(views.records)))
    prompts = {views.records[n].prompt for n in drawn if n != number} - {record.prompt, record.rephrase}
    return [Asked("same", prompt, record.image, None) for prompt in sorted(prompts)[:2]]


def _words(asked: Asked) -> str:
    return normal_words(asked.means or asked.prompt)


def _picture(image: VisualSource | None) -> str:
    return "" if image is None else image_key(image)


class TokenStore:
    """Tokens of questions at the point where the deltas begin, kept as long as there is room for them.

    Args:
        model: frozen. point: (layer, stage). questions: by record. room: bytes; others are walked again each time.
    """

    def __init__(self, model: EditableModel, point: tuple[int, str], questions: Questions, room: int) -> None:
        self.model, self.point, self.questions, self.room = model, point, questions, room
        self._kept: dict[tuple[int, int], PromptTokens] = {}

    def get(self, wanted: Sequence[tuple[int, int]]) -> PromptTokens:
        """Of (record, number of its question), in order. No delta may act."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._kept]
        made: dict[tuple[int, int], PromptTokens] = {}
        for start in range(0, len(missing), ROWS):
            part = missing[start : start + ROWS]
            asked = [self.questions.of[record][number] for record, number in part]
            tokens = walked(self.model, self.point, [Query(one.prompt, one.image) for one in asked])
            made |= dict(zip(part, tokens.split(), strict=True))
        found = PromptTokens.cat([self._kept[key] if key in self._kept else made[key] for key in wanted])
        for key, tokens in made.items():
            if tokens.n_bytes <= self.room:
                self.room -= tokens.n_bytes
                self._kept[key] = tokens
        return found


@torch.no_grad()
def walked(model: EditableModel, point: tuple[int, str], queries: Sequence[Query]) -> PromptTokens:
    """Tokens of prompts at a point of the frozen model."""
    state = packed_start(model, model.encode(queries, answers=False))
    return prompt_tokens(packed_prefix(model, state, *point))


@dataclass(frozen=True)
class Pairs:
    """Which of R questions belong to which of A of them.

    Args:
        related: (A, R) bool, the same question about the same thing.
        counts: (A, R) bool, whether a pair says anything: not one with itself, nor of an edit with what follows from
            it, nor of one question about two images that has one answer, which may show the same thing.
        own: (A, R) bool, of one record.
    """

    related: Tensor
    counts: Tensor
    own: Tensor

    @staticmethod
    def of(questions: Questions, keys: Sequence[tuple[int, int]], anchors: Sequence[int]) -> Pairs:
        """Of questions (record, number), anchors by their place among them."""
        asked = [questions.of[record][number] for record, number in keys]
        entity = torch.tensor([questions.entity(one) for one in asked])
        relation = torch.tensor([questions.relation(one) for one in asked])
        record = torch.tensor([record for record, _ in keys])
        answers = Classes()
        answer = torch.tensor([-1 if one.answer is None else answers.number(normal_words(one.answer)) for one in asked])
        follows = torch.tensor([one.kind == "portability" for one in asked])
        edits = torch.tensor([one.kind in RELATED for one in asked])
        chosen = torch.tensor(list(anchors))
        same_relation = relation[chosen, None] == relation
        related = same_relation & (entity[chosen, None] == entity)
        same_record = record[chosen, None] == record
        entailed = same_record & ((edits[chosen, None] & follows) | (follows[chosen, None] & edits))
        pictures = (entity[chosen, None] >= 0) & (entity >= 0)
        alike = same_relation & pictures & ~related & (answer[chosen, None] == answer) & (answer >= 0)
        itself = chosen[:, None] == torch.arange(len(keys))
        return Pairs(related, ~itself & ~entailed & ~alike, same_record)


class Untimed:
    """A timer that measures nothing."""

    def phase(self, _name: str) -> AbstractContextManager[None]:
        """Nothing is measured."""
        return nullcontext()
