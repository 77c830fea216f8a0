"""In-context knowledge editing: the edit is told in the prompt, behind demonstrations of what to make of such facts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastedit.backbone import EditableModel
from fastedit.backbone.encoding import row_size
from fastedit.deltas import DeltaSpec
from fastedit.deltas.install import PLACEHOLDER
from fastedit.evaluation import evaluation_views
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, ComputedDelta, Method, Resources
from fastedit.methods.retrieval import ENCODERS, TextIndex, text_encoder
from fastedit.requests import EditRequest, Query

_FIELDS = {"demonstration": ("{question}", "{answer}", "{asked}", "{told}"), "fact": ("{question}", "{answer}")}


@dataclass(frozen=True)
class IKEConfig:
    """Settings of ``ike``, after IKE (arXiv 2305.12740) as its multimodal port runs it (MMEdit, arXiv 2310.08475).

    Args:
        k: demonstrations, those nearest to the edit; fewer where the model has no positions for them. Needs a pool.
        encoder: what is near: "states" of the model itself, or "sentence-transformers", as published.
        encoder_model: name or folder of the sentence encoder.
        demonstration: "{question}" and "{answer}" are a fact, "{asked}" and "{told}" a question and what to answer it.
        fact: how the edit itself stands before the question, behind the demonstrations.
        own: let a demonstration of the edit itself come last, as the port does.
        answer_room: tokens that are kept free for answers.
    """

    k: int = 32
    encoder: str = "states"
    encoder_model: str = "all-MiniLM-L6-v2"
    demonstration: str = "New Fact: {question} {answer}\nPrompt: {asked} {told}\n\n"
    fact: str = "New Fact: {question} {answer}\nPrompt: "
    own: bool = True
    answer_room: int = 48

    def __post_init__(self) -> None:
        if not 0 <= self.k <= 64:
            raise ValueError(f"ike: k is 0 to 64 (got k={self.k!r})")
        if self.encoder not in ENCODERS:
            raise ValueError(f"ike: encoder is one of {list(ENCODERS)} (got encoder={self.encoder!r})")
        if self.answer_room < 1:
            raise ValueError(f"ike: answer_room is at least 1 (got answer_room={self.answer_room!r})")
        for name, wanted in _FIELDS.items():
            template = getattr(self, name)
            missing = [field for field in wanted if template.count(field) != 1]
            if missing:
                raise ValueError(f"ike: {name} holds {missing[0]} exactly once (got {name}={template!r})")

    def shown(self, question: str, answer: str, asked: str, told: str) -> str:
        """A demonstration."""
        values = {"{question}": question, "{answer}": answer, "{asked}": asked, "{told}": told}
        return _filled(self.demonstration, values)

    def stated(self, question: str, answer: str) -> str:
        """The edit before a question."""
        return _filled(self.fact, {"{question}": question, "{answer}": answer})


class IKE(Method):
    """Nothing of the model changes, and nothing is fitted: every question is asked behind the edit's text."""

    Config: ClassVar[type] = IKEConfig
    sequence: ClassVar[Accumulation] = "none"
    #: Without a fit there is nothing that another objective could change.
    objectives: ClassVar[tuple[str, ...]] = ("",)

    @staticmethod
    def spec(model: EditableModel, config: IKEConfig) -> DeltaSpec:
        """Text, without sites."""
        return DeltaSpec("context", ())

    @staticmethod
    def solver(model: EditableModel, config: IKEConfig) -> SolverConfig:
        """Nothing is fitted."""
        return SolverConfig(steps=0)

    @staticmethod
    def context(config: IKEConfig, request: EditRequest) -> str:
        """The edit alone; demonstrations stand before it as far as there is room."""
        return config.stated(request.prompt, request.target)

    @staticmethod
    def setup(model: EditableModel, config: IKEConfig, resources: Resources) -> TextIndex | None:
        """The index of all demonstrations of the pool.

        Raises:
            ValueError: demonstrations are wanted and there is no pool.
        """
        if not config.k:
            return None
        limit = _limit(model)
        encoder = text_encoder(model, config.encoder, config.encoder_model)
        found = dict.fromkeys(text for record in resources.pool for text in demonstrations(record, config))
        # A placeholder that a record happens to hold would be filled as well; what is too long is never shown
        texts = [text for text in found if PLACEHOLDER not in text and _length(model, text, False) <= limit]
        if not texts:
            raise ValueError(
                "ike: demonstrations come from a pool; give pool=..., or k=0 to state the edit alone "
                f"(got k={config.k}, pool of {len(resources.pool)} records)"
            )
        return TextIndex(texts, encoder)

    @staticmethod
    def compute(
        model: EditableModel,
        config: IKEConfig,
        shared: TextIndex | None,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[ComputedDelta]:
        """The text before any question, for every edit.

        Raises:
            ValueError: the model has no positions for the edit and one of its questions.
        """
        copies = [config.shown(r.prompt, r.target, r.prompt, r.target) for r in requests]
        near: list[list[int]] = [[] for _ in requests]
        # Where there is no room for the copy there is none for a demonstration
        short = [n for n, copy in enumerate(copies) if _length(model, copy, False) <= _limit(model)]
        if shared is not None and short:
            for number, numbers in zip(short, shared.nearest([copies[n] for n in short], config.k), strict=True):
                near[number] = numbers
        made = []
        for request, copy, numbers in zip(requests, copies, near, strict=True):
            # The edit's own demonstrations say what is wanted of it, and nothing of how to treat others
            shown_of_edit = set(demonstrations(request, config))
            shown = [] if shared is None else [shared.texts[n] for n in numbers if shared.texts[n] not in shown_of_edit]
            made.append(ComputedDelta(texts={"template": _template(model, config, request, copy, shown)}))
        return made


def demonstrations(record: EditRequest, config: IKEConfig) -> list[str]:
    """Copy, update and retain (arXiv 2305.12740, section 3.2): the fact itself, reworded, and another question."""
    fact = (record.prompt, record.target)
    made = [config.shown(*fact, *fact)]
    if record.rephrase is not None:
        made.append(config.shown(*fact, record.rephrase, record.target))
    if record.locality_prompt is not None and record.locality_answer is not None:
        made.append(config.shown(*fact, record.locality_prompt, record.locality_answer))
    return made


def _template(model: EditableModel, config: IKEConfig, request: EditRequest, copy: str, shown: Sequence[str]) -> str:
    """As many demonstrations as there is room for, the nearest first, then the edit."""
    fact = config.stated(request.prompt, request.target)
    if PLACEHOLDER in copy + fact:
        raise ValueError(f"ike: an edit's text does not hold {PLACEHOLDER!r} (got prompt={request.prompt!r:.80})")
    queries = [view.query for view in evaluation_views(request)]
    answered = [(query, max(config.answer_room, _answer_length(model, query))) for query in queries]
    longest, free = max(answered, key=lambda each: _tokens(model, each[0]) + each[1])
    room = _limit(model) - free

    def fits(parts: Sequence[str]) -> bool:
        return _tokens(model, longest, "".join(parts) + fact) <= room

    if not fits([]):
        raise ValueError(
            f"ike: the edit, a question and {free} tokens of an answer fit into a prompt of this model "
            f"(got prompt={request.prompt!r:.80}, target={request.target!r:.80})"
        )
    last = [copy] if config.own and fits([copy]) else []
    # By their own lengths first; joined, texts have a token more or less
    left, alone = room - _tokens(model, longest, "".join(last) + fact), _length(model, fact, False)
    number = 0
    for text in shown:
        left -= _length(model, text + fact, False) - alone
        if left < 0:
            break
        number += 1
    while number and not fits([*shown[:number], *last]):
        number -= 1
    return "".join([*shown[:number], *last]) + fact + PLACEHOLDER


def _tokens(model: EditableModel, query: Query, before: str = "") -> int:
    """Tokens of a question's row, its image's among them, with some text before the question."""
    seen = query.image is not None
    more = _length(model, before + query.prompt, seen) - _length(model, query.prompt, seen)
    return row_size(model, Query(query.prompt, query.image))[0] + more


def _answer_length(model: EditableModel, query: Query) -> int:
    """Tokens of a given answer, its end among them."""
    return 0 if query.answer is None else len(model.prompts.answer_ids("", query.answer))


def _length(model: EditableModel, prompt: str, with_image: bool) -> int:
    """Tokens of a prompt, an image counted as one."""
    return len(model.prompts.ids(model.prompts.text(prompt, with_image)))


def _limit(model: EditableModel) -> float:
    found: Any = getattr(model.adapter.text.config, "max_position_embeddings", None)
    return math.inf if found is None else float(found)


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with its fields filled, all at once: a value may hold what looks like a field."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]].strip(), template)
