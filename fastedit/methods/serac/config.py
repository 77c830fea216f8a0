"""Settings of SERAC and its published loss."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.objectives import ROLES, Losses, Role, TokenBatch
from fastedit.objectives.base import all_correct, losses_by_role
from fastedit.settings import check_fit, check_ranges
from fastedit.training.config import MANY_RECORDS

_POSITIVE = ("alpha", "scope_recall", "scope_batch", "valid_records", "scope_size", "scope_hidden", "scope_segments")
_NOT_NEGATIVE = (
    "scope_wordings",
    "rank",
    "edit_weight",
    "image_edit_weight",
    "locality_weight",
    "scope_weight",
    "memory_mib",
)


@dataclass(frozen=True)
class SERACConfig:
    """Settings of ``serac``, after SERAC (arXiv 2206.06520) and its multimodal port (MMEdit, arXiv 2310.08475).

    What is trained belongs to the artifact: an edit is refused where it asks for other layers, names, rank, context or
    scope than its artifact was trained with.

    Args:
        layers: of the counterfactual model that are trained: an int n for the last n decoder layers, or layer numbers.
            None is the last one, as the port trains of its 7B counterfactual model, and all of a decoder with up to 8.
        names: linear modules of a layer; None is all that it has.
        rank: of the trained change; 0 is full matrices, as published.
        alpha: a low-rank change is scaled by alpha / rank.
        context: how a cached edit stands before a question; "{question}" and "{answer}" are the edit's.
        threshold: similarity from which on an edit answers. The switch is hard under both protocols: the port mixes
            the probabilities of both models under teacher forcing, and switches at 0.5 when it generates.
        scope_layer: the scope reads states that enter this layer of the frozen model, or the first trained one if that
            comes later; None is the middle of the decoder. 0 is word embeddings, unless ``layers`` begins later.
        scope_wordings: rewordings of every record's question (``fastedit.fitting.wordings``) that the scope learns to
            accept, and as many of other questions that it learns to refuse; with any it also learns to refuse questions
            of other records that share most words with the record's own and have another answer before the edit.
        answer_wordings: share of the questions that the counterfactual model learns to answer which are put in other
            words in the same way: copying is then not bound to the wordings of training.
        scope_size, scope_hidden, scope_segments, scope_dropout: of the scope's heads, see ``ScopeShape``.
        faithful: the published choices where ours differ: the scope sees the text alone, nothing is reworded, image
            locality is no part of the loss, and the scope is trained through the mixture of both models only. The text
            encoder stays ours (states of the edited model; DistilBERT there).
        edit_weight: on the NLL of an edit and of its rephrased text (mean).
        image_edit_weight: on the NLL of its rephrased image.
        locality_weight: on the KL of each kind of locality.
        scope_weight: on the binary cross-entropy of the scope, which the paper trains by itself (section 3.3); its
            negatives are the questions that are near an edit: its own about other images, others about its image.
        scope_recall: weight of what lies in the scope against what does not.
        scope_batch: records of a step of the scope.
        swap: share of records that are given another target, so that what is learned is to copy. None is 0.5, or 0.75
            where training has fewer than 300 records.
        invented: share of these that are given one to three words of the tokenizer's vocabulary by lot, the others the
            target of another record. None is 0, or 0.75 where training has fewer than 300 records, of which it is the
            targets that would be learned (docs/methods.md); 0 where ``faithful``.
        valid_records: the last so many are kept for validation.
        memory_mib: for features that are kept between steps of training; others are made again each time.
    """

    layers: int | tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None
    rank: int = 0
    alpha: float = 16.0
    context: str = "{question} {answer}\n"
    threshold: float = 0.5
    scope_layer: int | None = None
    scope_wordings: int = 4
    answer_wordings: float = 0.5
    scope_size: int = 64
    scope_hidden: int = 256
    scope_segments: int = 1
    scope_dropout: float = 0.2
    faithful: bool = False
    edit_weight: float = 0.1
    image_edit_weight: float = 0.1
    locality_weight: float = 1.0
    scope_weight: float = 1.0
    scope_recall: float = 4.0
    scope_batch: int = 128
    swap: float | None = None
    invented: float | None = None
    valid_records: int = 64
    memory_mib: int = 1024

    def __post_init__(self) -> None:
        for field in ("{question}", "{answer}"):
            if self.context.count(field) != 1:
                raise ValueError(f"serac: context holds {field} exactly once (got context={self.context!r})")
        check_fit("serac", self)
        check_ranges(
            "serac",
            self,
            positive=_POSITIVE,
            not_negative=_NOT_NEGATIVE,
            shares=("swap", "invented", "answer_wordings"),
        )
        if self.scope_layer is not None and self.scope_layer < 0:
            raise ValueError(f"serac: scope_layer is 0 or more (got scope_layer={self.scope_layer!r})")
        if not 0 <= self.scope_dropout < 1:
            raise ValueError(
                f"serac: scope_dropout lies in 0 to 1, without 1 (got scope_dropout={self.scope_dropout!r})"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"serac: threshold lies between 0 and 1 (got threshold={self.threshold!r})")

    def cached(self, question: str, answer: str) -> str:
        """A cached edit as it stands before a question."""
        values = {"{question}": question.strip(), "{answer}": answer.strip()}
        # Both at once: an edit's own text may hold what looks like a field
        return re.sub(r"\{(question|answer)\}", lambda found: values[found[0]], self.context)


def targets_of(config: SERACConfig, records: int) -> tuple[float, float]:
    """The shares ``swap`` and ``invented`` of training with so many records."""
    many = records >= MANY_RECORDS or config.faithful
    swap = (0.5 if many else 0.75) if config.swap is None else config.swap
    invented = (0.0 if many else 0.75) if config.invented is None else config.invented
    return swap, 0.0 if config.faithful else invented


class SeracObjective:
    """The port's loss: 0.1 NLL of the edit, 0.1 NLL of its rephrased image, 1.0 KL(before || after) of each locality.

    Image locality has no weight in the published loss; it has in ours unless ``faithful``.
    """

    roles: tuple[Role, ...] = ROLES

    def __init__(self, config: SERACConfig) -> None:
        text, kept = config.edit_weight, config.locality_weight
        self.factors = [text / 2, text / 2, config.image_edit_weight, kept, 0.0 if config.faithful else kept]

    def __call__(self, tokens: TokenBatch, steps: int | Tensor) -> Losses:
        """Losses; ``steps`` is not used."""
        table = losses_by_role(tokens)
        total = (table * torch.tensor(self.factors).to(table)).sum(1)
        nll = table[:, int(Role.EDIT)].detach()
        return Losses(total, nll, all_correct(tokens), {"nll": nll})


def mixed(before: Tensor | None, after: Tensor | None, share: Tensor) -> Tensor:
    """log((1 - s) softmax(before) + s softmax(after)), or the logits of the one that is heard.

    Raises:
        ValueError: they are of different answers.
    """
    if before is None or after is None:
        found = after if before is None else before
        assert found is not None
        return found
    if before.shape != after.shape:
        raise ValueError(
            "serac: an answer has as many tokens behind a question as behind its cached edit "
            f"(got {before.shape[0]} and {after.shape[0]})"
        )
    share = share.clamp(1e-6, 1 - 1e-6)
    return torch.logaddexp(before.log_softmax(-1) + torch.log1p(-share), after.log_softmax(-1) + share.log())
