"""Edit requests: what one edit must change, what it must not, and how both are asked.

The classes hold text and image *sources*; nothing here opens a file. What can be known to be wrong without
reading anything is refused on construction, so that every other module may rely on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastedit.visuals import ImageSource, Video, VisualSource, checked_visual, images_of

__all__ = [
    "PARAPHRASE_KINDS",
    "PROBE_KINDS",
    "WORDINGS",
    "EditRequest",
    "ImageSource",
    "Probe",
    "Query",
    "Video",
    "VisualSource",
    "images_of",
]

#: What a probe varies: "near" same question and another image, "blind" same question and no image, "same" same image
#: and another question, "sibling" same image and wording but another object, "negated" a question with "not" and
#: "contrary" a false claim about the same image, "text_locality" and "image_locality" an unrelated question.
PROBE_KINDS: tuple[str, ...] = (
    "near", "blind", "same", "sibling", "negated", "contrary", "text_locality", "image_locality"
)  # fmt: skip
#: How a probe is worded: as training data are, or as nothing that is trained on.
WORDINGS: tuple[str, ...] = ("", "unseen")
#: Scores of the edit question in other words than `EditRequest.rephrase`: in those that nothing is trained on, the same
#: about another image of the thing, and as it was but more politely or carelessly put.
PARAPHRASE_KINDS: tuple[str, ...] = ("text_generality_unseen", "image_generality_unseen", "polite")


def _text(owner: str, name: str, value: object) -> None:
    """Refuse a value that is not text with at least one visible character."""
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} must be text (got {name}={value!r:.80})")
    if not value.strip():
        raise ValueError(f"{owner}: {name} must not be empty (got {name}={value!r:.80})")


def _optional_text(owner: str, name: str, value: object) -> None:
    """Refuse a value that is neither None nor non-empty text."""
    if value is not None:
        _text(owner, name, value)


def _visual(owner: str, holder: object, name: str) -> None:
    """Put what an image field holds in its one form, refusing what it cannot hold."""
    object.__setattr__(holder, name, checked_visual(owner, name, getattr(holder, name)))


def _together(owner: str, **parts: object) -> None:
    """Refuse when some but not all of the named parts are present."""
    absent = [name for name, value in parts.items() if value is None]
    if absent and len(absent) < len(parts):
        given = [name for name in parts if name not in absent]
        raise ValueError(f"{owner}: {' and '.join(parts)} go together (got {', '.join(given)} without {absent[0]})")


@dataclass(frozen=True, slots=True)
class Query:
    """One question to a model.

    Args:
        prompt: the question, not empty.
        image: what it is asked about: an image, a list of images, whose order counts, or a `Video`; None for a
            question in text only. A list stands where the prompt has as many "{image}", else before it.
        answer: the expected answer where one is known.
        kind: free mark by which scores may be grouped, for example "2-hop".
    Raises:
        TypeError, ValueError: "Query: rule (got name=...)".
    """

    prompt: str
    image: VisualSource | None = None
    answer: str | None = None
    kind: str = ""

    def __post_init__(self) -> None:
        _text("Query", "prompt", self.prompt)
        _visual("Query", self, "image")
        _optional_text("Query", "answer", self.answer)
        if not isinstance(self.kind, str):
            raise TypeError(f"Query: kind must be text (got kind={self.kind!r:.80})")


@dataclass(frozen=True, slots=True)
class Probe:
    """A question at which an edit must not fire.

    Args:
        kind: one of `PROBE_KINDS`: "near" (same question, other image), "blind" (same question, no image), "same"
            (same image, other question), "sibling" (same image and wording, other object), "negated", "contrary"
            (claims about the same image), "text_locality" or "image_locality" (unrelated).
        prompt: the question, not empty.
        image: None where `kind` is "blind" or "text_locality"; an image where it is "near" or "image_locality".
        answer: the right answer where it is known; else the model's own answer before the edit is the reference.
        wording: "" or "unseen": in words that no training data have, which is a score of its own.
    Raises:
        TypeError, ValueError: "Probe: rule (got name=...)".
    """

    kind: str
    prompt: str
    image: VisualSource | None = None
    answer: str | None = None
    wording: str = ""

    def __post_init__(self) -> None:
        if self.kind not in PROBE_KINDS:
            raise ValueError(f"Probe: kind must be one of {', '.join(PROBE_KINDS)} (got kind={self.kind!r:.80})")
        _text("Probe", "prompt", self.prompt)
        _visual("Probe", self, "image")
        _optional_text("Probe", "answer", self.answer)
        if self.kind in ("blind", "text_locality") and self.image is not None:
            raise ValueError(f"Probe: a {self.kind} probe has no image (got kind={self.kind!r} with an image)")
        if self.kind in ("near", "image_locality") and self.image is None:
            raise ValueError(f"Probe: a {self.kind} probe needs another image (got kind={self.kind!r}, image=None)")
        if self.wording not in WORDINGS:
            raise ValueError(f'Probe: wording must be "" or "unseen" (got wording={self.wording!r:.80})')

    @property
    def score(self) -> str:
        """The score that the probe counts for."""
        return f"{self.kind}_{self.wording}" if self.wording else self.kind

    @property
    def query(self) -> Query:
        """The same question as a `Query`."""
        return Query(self.prompt, self.image, self.answer)


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One edit: asked `prompt` about `image`, answer `target` from now on. Absent parts are None.

    Args:
        prompt: the edit question, not empty.
        target: the new answer, not empty.
        image: what the question is about: an image, a list of images, whose order counts, or a `Video`; None for an
            edit of text-only knowledge. A list stands where the prompt has as many "{image}", else before it. Other
            image fields take the same.
        rephrase: the same question in other words (text generality, asked about `image`).
        image_rephrase: another image of the same thing (image generality, asked with `prompt`).
        locality_prompt, locality_answer: an unrelated question without image (text locality); an answer needs
            its prompt.
        image_locality_image, image_locality_prompt, image_locality_answer: an unrelated question about another
            image (image locality); image and prompt go together, an answer needs both.
        portability: questions whose answer follows from the edit, with that answer.
        probes: questions at which the edit must not fire.
        paraphrases: the edit question in further words, of a kind of `PARAPHRASE_KINDS`, which is the score it counts
            for; without an answer the target is wanted. Nothing is ever fitted or trained on them.
        prediction: the answer that a model gave before the edit, where the record has one (MMEdit "pred").
        id: stable name of the record, for example "vqa_eval.json#17".
        tags: free marks, for example ("hard",).
    Raises:
        TypeError, ValueError: "EditRequest: rule (got name=...)".
    """

    prompt: str
    target: str
    image: VisualSource | None = None
    rephrase: str | None = None
    image_rephrase: VisualSource | None = None
    locality_prompt: str | None = None
    locality_answer: str | None = None
    image_locality_image: VisualSource | None = None
    image_locality_prompt: str | None = None
    image_locality_answer: str | None = None
    portability: tuple[Query, ...] = ()
    probes: tuple[Probe, ...] = ()
    prediction: str | None = None
    id: str = ""
    tags: tuple[str, ...] = ()
    paraphrases: tuple[Query, ...] = ()

    def __post_init__(self) -> None:
        owner = "EditRequest"
        for name in ("prompt", "target"):
            _text(owner, name, getattr(self, name))
        for name in ("rephrase", "locality_prompt", "locality_answer"):
            _optional_text(owner, name, getattr(self, name))
        for name in ("image_locality_prompt", "image_locality_answer"):
            _optional_text(owner, name, getattr(self, name))
        for name in ("image", "image_rephrase", "image_locality_image"):
            _visual(owner, self, name)
        # A recorded prediction may be empty: models do answer with nothing.
        if self.prediction is not None and not isinstance(self.prediction, str):
            raise TypeError(f"{owner}: prediction must be text (got prediction={self.prediction!r:.80})")
        if not isinstance(self.id, str):
            raise TypeError(f"{owner}: id must be text (got id={self.id!r:.80})")
        object.__setattr__(self, "portability", _members(self.portability, "portability", Query))
        object.__setattr__(self, "probes", _members(self.probes, "probes", Probe))
        object.__setattr__(self, "tags", _members(self.tags, "tags", str))
        object.__setattr__(self, "paraphrases", _members(self.paraphrases, "paraphrases", Query))
        for number, each in enumerate(self.paraphrases):
            if each.kind not in PARAPHRASE_KINDS:
                got = f"paraphrases[{number}].kind={each.kind!r:.80}"
                raise ValueError(f"{owner}: paraphrases have a kind of {', '.join(PARAPHRASE_KINDS)} (got {got})")
        if self.locality_answer is not None and self.locality_prompt is None:
            raise ValueError(f"{owner}: locality_answer needs locality_prompt (got locality_prompt=None)")
        _together(
            owner,
            image_locality_image=self.image_locality_image,
            image_locality_prompt=self.image_locality_prompt,
        )
        if self.image_locality_answer is not None and self.image_locality_prompt is None:
            raise ValueError(f"{owner}: image_locality_answer needs image_locality_prompt (got None)")

    @property
    def query(self) -> Query:
        """The edit question with its new answer, as a `Query`."""
        return Query(self.prompt, self.image, self.target)


def _members(values: Iterable[object], name: str, kind: type) -> tuple[object, ...]:
    """Return the values as a tuple, refusing members of another type (and text in the place of a list)."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"EditRequest: {name} must be a list of {kind.__name__} (got type {type(values).__name__})")
    members = tuple(values)
    for position, member in enumerate(members):
        if not isinstance(member, kind):
            got = f"{name}[{position}] of type {type(member).__name__}"
            raise TypeError(f"EditRequest: {name} must hold {kind.__name__} (got {got})")
    return members
