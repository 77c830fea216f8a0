"""What a list of edits holds that scores do not show: duplicates, conflicts, shared images, leakage."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastedit.data.images import image_key
from fastedit.requests import EditRequest

_QUOTES = "\"'`“”‘’"


def question_key(text: str) -> str:
    """Return a question as it is compared: case, white space, outer quotes and final punctuation do not count.

    A quarter of E-VQA's rephrases are wrapped in quotes, so quotes must not tell two questions apart.
    """
    plain = re.sub(r"\s+", " ", text).strip().strip(_QUOTES).strip()
    return plain.rstrip("?.!: ").strip(_QUOTES).casefold()


def target_key(text: str) -> str:
    """Return a target as it is compared: case and white space do not count."""
    return re.sub(r"\s+", " ", text).strip().casefold()


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Edits with the same image, question and target. `edits` are positions in the list."""

    question: str
    target: str
    edits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Edits that claim the same question about the same image with different targets.

    Args:
        question: the question, as it is compared.
        edits: positions in the list.
        targets: the targets in the same order.
        asked_as: "prompt" or "rephrase", in the same order: the field in which each edit asks the question.
    """

    question: str
    edits: tuple[int, ...]
    targets: tuple[str, ...]
    asked_as: tuple[str, ...]

    @property
    def literal(self) -> bool:
        """Whether two edit prompts themselves collide, not only a rephrase with something else."""
        targets = {target_key(t) for t, field in zip(self.targets, self.asked_as) if field == "prompt"}
        return len(targets) > 1


@dataclass(frozen=True, slots=True)
class Report:
    """Findings about one list of edits; every member names positions in the list.

    Args:
        n_edits: length of the list.
        n_images: number of distinct edit images.
        duplicates: same image, question and target.
        conflicts: same image and question (as prompt or as rephrase), different targets.
        shared_images: groups of edits on one image.
        already_right: edits whose recorded prediction is the target.
        same_rephrase: edits whose rephrase is the prompt.
        odd_rephrase: edits whose rephrase has several lines, a language model's chatter instead of one question.
        locality_on_edit_image: edits whose image-locality image is the edit image of an edit in the list.
    """

    n_edits: int
    n_images: int
    duplicates: tuple[Duplicate, ...]
    conflicts: tuple[Conflict, ...]
    shared_images: tuple[tuple[int, ...], ...]
    already_right: tuple[int, ...]
    same_rephrase: tuple[int, ...]
    odd_rephrase: tuple[int, ...]
    locality_on_edit_image: tuple[int, ...]

    def __str__(self) -> str:
        literal = sum(conflict.literal for conflict in self.conflicts)
        on_shared = sum(len(group) for group in self.shared_images)
        rows = [
            f"{self.n_edits} edits on {self.n_images} images; {on_shared} edits share an image with another",
            f"{len(self.duplicates)} duplicates (same image, question and target)",
            f"{len(self.conflicts)} conflicts (same image and question, different targets), "
            f"{literal} of them between edit prompts",
            f"{len(self.already_right)} edits whose recorded prediction already is the target",
            f"{len(self.same_rephrase)} rephrases equal to the prompt, {len(self.odd_rephrase)} of several lines",
            f"{len(self.locality_on_edit_image)} image-locality questions on the image of an edit",
        ]
        return "\n".join(rows)


def report(edits: Sequence[EditRequest]) -> Report:
    """Return what is odd about a list of edits. Images are compared by path, or by content when in memory."""
    images = [None if edit.image is None else image_key(edit.image) for edit in edits]
    on_image = _groups(range(len(edits)), lambda i: images[i])
    on_image.pop(None, None)
    asked: dict[Hashable, list[tuple[int, str]]] = defaultdict(list)
    for position, edit in enumerate(edits):
        prompt = question_key(edit.prompt)
        asked[images[position], prompt].append((position, "prompt"))
        if edit.rephrase is not None and question_key(edit.rephrase) != prompt:
            asked[images[position], question_key(edit.rephrase)].append((position, "rephrase"))
    targets = [target_key(edit.target) for edit in edits]
    return Report(
        n_edits=len(edits),
        n_images=len(on_image),
        duplicates=tuple(_duplicates(edits, images, targets)),
        conflicts=tuple(_conflicts(edits, asked, targets)),
        shared_images=tuple(tuple(group) for group in on_image.values() if len(group) > 1),
        already_right=_where(
            edits, lambda e: e.prediction is not None and target_key(e.prediction) == target_key(e.target)
        ),
        same_rephrase=_where(
            edits, lambda e: e.rephrase is not None and question_key(e.rephrase) == question_key(e.prompt)
        ),
        odd_rephrase=_where(edits, lambda e: e.rephrase is not None and "\n" in e.rephrase.strip()),
        locality_on_edit_image=_where(
            edits, lambda e: e.image_locality_image is not None and image_key(e.image_locality_image) in on_image
        ),
    )


def _groups(positions: Iterable[int], key: Callable[[int], Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position in positions:
        groups[key(position)].append(position)
    return groups


def _where(edits: Sequence[EditRequest], condition: Callable[[EditRequest], bool]) -> tuple[int, ...]:
    return tuple(position for position, edit in enumerate(edits) if condition(edit))


def _duplicates(
    edits: Sequence[EditRequest], images: Sequence[str | None], targets: Sequence[str]
) -> Iterable[Duplicate]:
    same = _groups(range(len(edits)), lambda i: (images[i], question_key(edits[i].prompt), targets[i]))
    for group in same.values():
        if len(group) > 1:
            yield Duplicate(edits[group[0]].prompt, edits[group[0]].target, tuple(group))


def _conflicts(
    edits: Sequence[EditRequest],
    asked: Mapping[Hashable, Sequence[tuple[int, str]]],
    targets: Sequence[str],
) -> Iterable[Conflict]:
    found: dict[tuple[int, ...], Conflict] = {}
    for key, askers in asked.items():
        if len({targets[position] for position, _ in askers}) < 2:
            continue
        question = key[1] if isinstance(key, tuple) else ""
        positions = tuple(position for position, _ in askers)
        fields = tuple(field for _, field in askers)
        # Two edits may collide both by prompt and by rephrase: one conflict, the stronger one.
        known = found.get(tuple(sorted(positions)))
        conflict = Conflict(str(question), positions, tuple(edits[p].target for p in positions), fields)
        if known is None or (conflict.literal and not known.literal):
            found[tuple(sorted(positions))] = conflict
    return found.values()


@dataclass(frozen=True, slots=True)
class Leakage:
    """What an evaluation list shares with a training list.

    Args:
        images: image keys that are edit images in both lists.
        edits: positions in the evaluation list whose edit image is also an edit image in training.
        n_images: number of distinct edit images of the evaluation list.
        n_edits: its length.
        questions: positions whose image and question both occur in training (as prompt or rephrase).
        conflicts: those among them that training answers differently.
    """

    images: tuple[str, ...]
    edits: tuple[int, ...]
    n_images: int
    n_edits: int
    questions: tuple[int, ...]
    conflicts: tuple[int, ...]

    def __str__(self) -> str:
        share = len(self.images) / self.n_images if self.n_images else 0.0
        return (
            f"{len(self.images)} of {self.n_images} evaluation images ({share:.0%}) are also edited in training, "
            f"with {len(self.edits)} of {self.n_edits} edits; {len(self.questions)} ask a question of training, "
            f"{len(self.conflicts)} with another answer"
        )


def leakage(train: Sequence[EditRequest], eval: Sequence[EditRequest]) -> Leakage:
    """Return what an evaluation list shares with a training list; drop `Leakage.edits` for a clean split."""
    trained: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for edit in train:
        if edit.image is not None:
            for question in _questions(edit):
                trained[image_key(edit.image)][question].add(target_key(edit.target))
    images = [None if edit.image is None else image_key(edit.image) for edit in eval]
    leaked = [p for p, image in enumerate(images) if image is not None and image in trained]
    questions, conflicts = [], []
    for position in leaked:
        known = trained[str(images[position])]
        answers = [known[question] for question in _questions(eval[position]) if question in known]
        if answers:
            questions.append(position)
            if any(target_key(eval[position].target) not in targets for targets in answers):
                conflicts.append(position)
    return Leakage(
        images=tuple(dict.fromkeys(str(images[p]) for p in leaked)),
        edits=tuple(leaked),
        n_images=len({image for image in images if image is not None}),
        n_edits=len(eval),
        questions=tuple(questions),
        conflicts=tuple(conflicts),
    )


def _questions(edit: EditRequest) -> set[str]:
    return {question_key(text) for text in (edit.prompt, edit.rephrase) if text is not None}
