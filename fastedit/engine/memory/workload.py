"""What the rows of a run are like, read off its first edits: tokens, labels, images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from fastedit.backbone import EditableModel, ImageInputs
from fastedit.backbone.encoding import row_size
from fastedit.evaluation import evaluation_views
from fastedit.objectives import Role
from fastedit.requests import EditRequest, Query

#: Edits that are looked at, spread over all.
SAMPLE = 8
# Tokens of an answer that nobody has given yet
_ANSWER = 5


@dataclass(frozen=True)
class RowKind:
    """Rows of one use.

    Args:
        per_edit: how many an edit has.
        tokens: of the longest; of training rows the mean over the roles, each by its longest row: rows are not padded.
        labels: of one, on average.
    """

    per_edit: float
    tokens: float
    labels: float


@dataclass(frozen=True)
class Workload:
    """Rows and images of a run.

    Args:
        training, evaluation: the rows. images_per_edit: distinct ones, of both.
        image_tokens: of the largest image. patches: tokens that the vision side sees of it.
        image_bytes: of its preprocessed form.
        edits: how many, None where that is not known.
    """

    training: RowKind
    evaluation: RowKind
    images_per_edit: float
    image_tokens: int
    patches: int
    image_bytes: int
    edits: int | None


def measure_workload(
    model: EditableModel,
    roles: Sequence[Role],
    edits: Sequence[EditRequest] | None,
    *,
    evaluate: bool,
    tokens_per_row: int | None = None,
) -> Workload:
    """Return what the rows of some edits are like; of a typical visual question where there are no edits.

    Args:
        model: with or without weights. roles: views that an edit is fitted on.
        edits: of the run. evaluate: whether they are scored. tokens_per_row: instead of the measured ones.
    """
    step = max(1, -(-len(edits) // SAMPLE)) if edits else 1
    sample = list(edits[::step]) if edits else [typical_edit(model)]
    fitted = [[_fitted(edit, role) for edit in sample] for role in roles]
    asked = [view.query for edit in sample for view in evaluation_views(edit)] if evaluate else []
    images: dict[str, ImageInputs] = {}
    for query in itertools.chain(*fitted, asked):
        if query.image is not None:
            read = model.images.read(query.image)
            images |= {part.key: part for part in read.looked_at}
    # A shaken copy of the image stands in for another picture of the same
    made = Role.IMAGE_REPHRASE in roles
    largest = max(images.values(), key=lambda image: image.tokens, default=None)
    by_role = [_kind(model, queries, len(sample)) for queries in fitted]
    training = RowKind(
        per_edit=len(roles),
        tokens=sum(kind.tokens for kind in by_role) / len(roles),
        labels=sum(kind.labels for kind in by_role) / len(roles),
    )
    work = Workload(
        training=training,
        evaluation=_kind(model, asked, len(sample)),
        images_per_edit=len(images) / len(sample) + made,
        image_tokens=largest.tokens if largest else 0,
        patches=_patches(model, largest) if largest else 0,
        image_bytes=sum(part.nbytes for part in largest.tensors.values()) if largest else 0,
        edits=len(edits) if edits is not None else None,
    )
    if tokens_per_row is None:
        return work
    kinds = [replace(kind, tokens=tokens_per_row) for kind in (work.training, work.evaluation)]
    return replace(work, training=kinds[0], evaluation=kinds[1])


def typical_edit(model: EditableModel) -> EditRequest:
    """An edit of usual size: a photo where the model takes one, a short question, an answer of a few words."""
    text = EditRequest(
        prompt="What is the color of the bus on the left?",
        target="red and white",
        rephrase="Which color does the bus on the left side have?",
        locality_prompt="What is the name of the capital of the country?",
        locality_answer="the name of a city",
    )
    if model.adapter.most_images == 0:
        return text
    photo, other = Image.new("RGB", (640, 480), "white"), Image.new("RGB", (640, 480), "black")
    return replace(
        text,
        image=photo,
        image_rephrase=Image.new("RGB", (640, 480), "red"),
        image_locality_image=other,
        image_locality_prompt="What is the man in the photo doing there?",
        image_locality_answer="riding a bike",
    )


def _fitted(edit: EditRequest, role: Role) -> Query:
    """About the row that an edit is fitted on in a role; held-out views are of the record's own sizes."""
    if role is Role.TEXT_REPHRASE and edit.rephrase is not None:
        return Query(edit.rephrase, edit.image, edit.target)
    if role is Role.TEXT_LOCALITY and edit.locality_prompt is not None:
        return Query(edit.locality_prompt, None, edit.locality_answer)
    if role is Role.IMAGE_LOCALITY and edit.image_locality_prompt is not None:
        return Query(edit.image_locality_prompt, edit.image_locality_image, edit.image_locality_answer)
    return Query(edit.prompt, edit.image, edit.target)


def _kind(model: EditableModel, queries: Sequence[Query], edits: int) -> RowKind:
    sizes = [row_size(model, query) for query in queries]
    if not sizes:
        return RowKind(0, 0, 0)
    counts = [labels or _ANSWER for _, labels in sizes]
    tokens = max(tokens + (0 if labels else _ANSWER) for tokens, labels in sizes)
    return RowKind(len(sizes) / edits, tokens, sum(counts) / len(counts))


def _patches(model: EditableModel, image: ImageInputs) -> int:
    """Tokens that the vision side sees of an image: pixels over the pixels of a patch."""
    vision = model.hf.config.vision_config
    per_patch = 3 * int(vision.patch_size) ** 2 * int(getattr(vision, "temporal_patch_size", 1))
    return max(part.numel() for part in image.tensors.values()) // per_patch
