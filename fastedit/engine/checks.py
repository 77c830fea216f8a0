"""What makes a run impossible, said before any work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from fastedit.backbone import EditableModel
from fastedit.data.images import image_key
from fastedit.data.report import question_key, target_key
from fastedit.methods import EditPlan
from fastedit.requests import EditRequest
from fastedit.training import Artifact, load_artifact, require_artifact


def check_sequence(
    plan: EditPlan, mode: str, score_at: Sequence[int], edits: int, score_sample: int | None = None
) -> None:
    """Refuse a sequence that the method cannot make, or scores at gaps that there are not.

    Raises:
        ValueError: see there.
    """
    if mode == "sequential" and plan.method.sequence == "none":
        raise ValueError(f"edit: {plan.name} edits one question at a time and keeps no sequence (got mode={mode!r})")
    retain = getattr(plan.config, "retain", "none")
    if retain != "none" and mode != "sequential":
        raise ValueError(
            f"edit: retain belongs to mode='sequential', where edits follow one another (got mode={mode!r}, "
            f"retain={retain!r})"
        )
    if score_sample is not None and (mode != "sequential" or score_sample < 1):
        raise ValueError(
            f"edit: score_sample is at least 1, or None, and belongs to mode='sequential' (got mode={mode!r}, "
            f"score_sample={score_sample!r})"
        )
    if score_at and mode != "sequential":
        raise ValueError(f"edit: score_at belongs to mode='sequential' (got mode={mode!r}, score_at={score_at!r})")
    for count in score_at:
        if not 1 <= count <= edits:
            raise ValueError(f"edit: score_at names numbers of edits, 1 to {edits} (got score_at={list(score_at)})")


def question_of(edit: EditRequest) -> str:
    """What identifies an edit's question about its image; wordings that differ in case or marks alone are one."""
    image = "" if edit.image is None else image_key(edit.image)
    return hashlib.sha256(f"{image}\n{question_key(edit.prompt)}".encode()).hexdigest()[:16]


def check_conflicts(edits: Sequence[EditRequest]) -> None:
    """Refuse a sequence in which one question about one image gets two answers.

    Raises:
        ValueError: names the first two edits that contradict each other.
    """
    answers: dict[str, tuple[int, EditRequest]] = {}
    for number, edit in enumerate(edits):
        first, other = answers.setdefault(question_of(edit), (number, edit))
        if target_key(other.target) != target_key(edit.target):
            detail = f"edits[{first}].target={other.target!r:.60} and edits[{number}].target={edit.target!r:.60}"
            raise ValueError(
                f"edit: in a sequence a question has one answer; conflicts='last' lets the later one stand "
                f"(got {detail} to prompt={edit.prompt!r:.60})"
            )


def trained_parts(model: EditableModel, plan: EditPlan, artifact: Artifact | str | Path | None) -> Artifact | None:
    """The trained parts that a method needs, put at the model's disposal.

    Raises:
        ValueError: it needs some and none were given, or those given are of another kind or model, or it needs none.
    """
    kind = plan.artifact_kind
    if kind is None:
        if artifact is not None:
            raise ValueError(f"edit: {plan.name} has no trained parts (got artifact={artifact!r:.80})")
        return None
    given = load_artifact(artifact, model, kind=kind) if isinstance(artifact, (str, Path)) else artifact
    made = require_artifact(given, kind, model)
    model.artifacts[made.id] = made
    return made
