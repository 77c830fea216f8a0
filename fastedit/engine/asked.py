"""The questions of an edit, each with the fields of the record that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastedit.requests import EditRequest, Probe, Query, VisualSource


@dataclass(frozen=True)
class AskedPart:
    """One question of an edit, as it will be asked.

    Args:
        field: of the question. prompt: its text. shown: field of its image. image: None for text only.
        answer_field: of the answer. answer: None where none is given.
    """

    field: str
    prompt: str
    shown: str = ""
    image: VisualSource | None = None
    answer_field: str = ""
    answer: str | None = None


def asked_parts(edit: EditRequest, *, fitted: bool, scored: bool, predicted: bool = False) -> Iterator[AskedPart]:
    """Yield the questions of an edit: its own; those for fitting or scoring; those for scoring only.

    Args:
        fitted: what training views are made of. scored: probes and portability too. predicted: with the answer
            before the edit, which is one of a view near another edit.
    """
    yield AskedPart("prompt", edit.prompt, "image", edit.image, "target", edit.target)
    if predicted and edit.prediction and edit.prediction.strip():
        yield AskedPart("prompt", edit.prompt, "image", edit.image, "prediction", edit.prediction)
    if fitted or scored:
        if edit.rephrase is not None:
            yield AskedPart("rephrase", edit.rephrase, "image", edit.image, "target", edit.target)
        if edit.image_rephrase is not None:
            yield AskedPart("prompt", edit.prompt, "image_rephrase", edit.image_rephrase, "target", edit.target)
        if edit.locality_prompt is not None:
            yield AskedPart("locality_prompt", edit.locality_prompt, "", None, "locality_answer", edit.locality_answer)
        if edit.image_locality_prompt is not None:
            yield AskedPart(
                "image_locality_prompt", edit.image_locality_prompt, "image_locality_image", edit.image_locality_image,
                "image_locality_answer", edit.image_locality_answer,
            )  # fmt: skip
    if scored:
        for number, each in enumerate(edit.paraphrases):
            place, answer = f"paraphrases[{number}]", each.answer or edit.target
            answer_field = f"{place}.answer" if each.answer else "target"
            yield AskedPart(f"{place}.prompt", each.prompt, f"{place}.image", each.image, answer_field, answer)
        yield from _members("portability", edit.portability)
        yield from _members("probes", edit.probes)


def _members(name: str, members: Sequence[Query | Probe]) -> Iterator[AskedPart]:
    for number, each in enumerate(members):
        place = f"{name}[{number}]"
        yield AskedPart(f"{place}.prompt", each.prompt, f"{place}.image", each.image, f"{place}.answer", each.answer)
