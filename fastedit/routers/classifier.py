"""The disentanglement classifier: does a prompt ask what an edit is about, of the image that it is about?

LDKE (arXiv 2605.29826) sends related inputs to the edited and unrelated ones to the original model; only its abstract
was to be had, so the design is ours. Two heads read states that exist anyway, at the point where the deltas begin: the
entity head the tokens of the image, the relation head those of the text. An edit acts where both say yes: the
probability is the product of theirs, each a logistic of the cosine to what the edit left in memory. So what is
entangled in the model's states is judged apart: the same image with another question fails by the relation, the same
question with another image by the entity. A product of two matrices scores a prompt against any number of edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastedit.backbone import EditableModel, PackedState
from fastedit.routers import Routed
from fastedit.routers.agreement import Agreement
from fastedit.routers.claims import Claims, pairs_above
from fastedit.routers.features import AttentionPool, PromptTokens, prompt_tokens
from fastedit.routers.scope import trained_part
from fastedit.routers.tables import has_index, tables_of

PREFIX = "classifier/"
#: Distance of two images' centres (unit vectors) below which they are the same pixels: rounding stays far below it,
#: other renderings of a scene far above.
SAME_IMAGE = 0.02
#: How much larger, in log-odds, the best claim on a prompt is than one that answers otherwise. Found on a train split.
MARGIN = 0.75
#: Where no claim is: how much nearer the image of one is than those of the others (the ratio test of Lowe, IJCV 2004).
RATIO = 0.25
#: Name of a delta's text that says which answer it installs; deltas without it agree with no other.
ANSWER = "answer"


@dataclass(frozen=True)
class ClassifierShape:
    """Sizes of the heads.

    Args:
        width: d of the states. size: of a head's vector. queries: per head. key: width of their keys and values.
    """

    width: int
    size: int = 256
    queries: int = 8
    key: int = 64

    def __post_init__(self) -> None:
        for name in ("width", "size", "queries", "key"):
            if getattr(self, name) < 1:
                raise ValueError(f"classifier: {name} is at least 1 (got {name}={getattr(self, name)!r})")


class Disentangler(nn.Module):
    """Entity and relation head, and how near two of their vectors must be.

    Args:
        shape: sizes. seed: of the first weights.
    """

    threshold: Tensor

    def __init__(self, shape: ClassifierShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.entity = AttentionPool(shape.width, shape.queries, shape.key, shape.size, generator)
        self.relation = AttentionPool(shape.width, shape.queries, shape.key, shape.size, generator)
        #: Stands for the image of prompts that have none
        self.nothing = nn.Parameter(torch.randn(shape.size, generator=generator))
        # Slope and offset of the two logits: at cosine 1/2 a head is undecided
        self.slope = nn.Parameter(torch.full((2,), 10.0))
        self.offset = nn.Parameter(torch.full((2,), -5.0))
        self.register_buffer("threshold", torch.tensor(0.5).log())

    def forward(self, tokens: PromptTokens) -> tuple[Tensor, Tensor]:
        """Entity and relation vectors (R, size), float32, of length 1."""
        seen = (tokens.image_count > 0)[:, None]
        nothing = F.normalize(self.nothing, dim=0).expand(len(tokens), -1)
        # where, not a product: a row without an image has no gradient to the pool
        entity = torch.where(seen, self.entity(tokens.image, tokens.image_count), nothing)
        return entity, self.relation(tokens.text, tokens.text_count)

    def logits(self, entity: Tensor, relation: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' logits of cosines of any shape."""
        return self.slope[0] * entity + self.offset[0], self.slope[1] * relation + self.offset[1]

    def log_probability(self, entity: Tensor, relation: Tensor) -> Tensor:
        """Logarithm of the product of both probabilities, of cosines of any shape."""
        by_entity, by_relation = self.logits(entity, relation)
        return F.logsigmoid(by_entity) + F.logsigmoid(by_relation)

    def least_entity(self, least: float) -> float:
        """The cosine of entity vectors below which no probability's logarithm reaches ``least``.

        Minus infinity where the entity head does not rise with the cosine.
        """
        slope, offset = self.slope.tolist(), self.offset.tolist()
        # The other head's best, and what that leaves for this one
        most = float(F.logsigmoid(torch.tensor(abs(slope[1]) + offset[1], dtype=torch.float64)))
        rest = torch.tensor(least - most, dtype=torch.float64)
        return (float(log_odds(rest)) - offset[0]) / slope[0] if slope[0] > 0 else -torch.inf

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for an artifact."""
        return {PREFIX + name: tensor for name, tensor in self.state_dict().items()}

    def settings(self) -> dict[str, Any]:
        """The shape as plain values, for an artifact's config."""
        return asdict(self.shape)

    @staticmethod
    def of(artifact: Any, device: torch.device) -> Disentangler:
        """The classifier that an artifact holds (config "classifier" and tensors "classifier/..."), frozen."""
        made = Disentangler(ClassifierShape(**artifact.config["classifier"]))
        known = {n.removeprefix(PREFIX): t for n, t in artifact.tensors.items() if n.startswith(PREFIX)}
        made.load_state_dict(known)
        return made.to(device).eval().requires_grad_(False)


class ClassifierRouter:
    """An edit acts where the logarithm of the classifier's probability reaches the threshold.

    The threshold is the one that training set, or ``threshold`` (a probability) of the spec's options. The edits'
    fixed tensors: ``entity`` and ``relation`` vectors (B, size) and ``image``, the centre of the image (B, d).
    """

    def __init__(self, model: EditableModel, stacked: Routed) -> None:
        options = stacked.spec.options
        self.classifier = Disentangler.of(trained_part(model, options), model.device)
        #: Besides the probability; None for classifiers that were trained without.
        self.agreement = Agreement.from_config(trained_part(model, options).config)
        given = options.get("threshold")
        self.least = float(self.classifier.threshold) if given is None else float(torch.tensor(given).log())
        self.model, self.stacked = model, stacked
        self._read: tuple[Sequence[Mapping[str, str]], Tensor] | None = None

    @property
    def answers(self) -> Tensor:
        """(B,) int64, equal where two edits install the same answer; looked up once for many texts."""
        texts = self.stacked.texts
        if self._read is None or self._read[0] is not texts:
            self._read = texts, answer_numbers([each.get(ANSWER) for each in texts])
        return self._read[1]

    @torch.no_grad()
    def scores(self, state: PackedState, fixed: Mapping[str, Tensor], own: Tensor | None) -> Tensor:
        """See `Router`; at most 0. Of edits that claim a prompt and are not to have it, minus infinity."""
        tokens = prompt_tokens(state)
        entity, relation = self.classifier(tokens)
        known_entity, known_relation = fixed["entity"].to(entity.dtype), fixed["relation"].to(relation.dtype)
        if own is not None:
            by_entity = (entity * known_entity[own]).sum(1)
            return self.classifier.log_probability(by_entity, (relation * known_relation[own]).sum(1))
        cosine = entity @ known_entity.T
        found = self.classifier.log_probability(cosine, relation @ known_relation.T)
        images = fixed["image"].to(entity.dtype)
        if self.agreement is not None:
            distance = torch.cdist(tokens.centre(), images, compute_mode="donot_use_mm_for_euclid_dist")
            found[Agreement.of(cosine, distance) < self.agreement.least(len(images))] = -torch.inf
        return settled(found, self.least, tokens.centre(), images, self.answers.to(found.device))

    @torch.no_grad()
    def claims(self, state: PackedState, fixed: Mapping[str, Tensor]) -> Claims:
        """See `fastedit.routers.claims.Claiming`; of a row that several edits claim, the one that is to have it."""
        tokens = prompt_tokens(state)
        entity, relation = self.classifier(tokens)
        known_entity, known_relation = fixed["entity"].to(entity.dtype), fixed["relation"].to(relation.dtype)
        found, centre, images = [], tokens.centre(), fixed["image"]
        for row, edit in self._pairs(entity, relation, known_entity, known_relation):
            by_entity = (entity[row] * known_entity[edit]).sum(1)
            score = self.classifier.log_probability(by_entity, (relation[row] * known_relation[edit]).sum(1))
            reaches = score >= self.least
            if self.agreement is not None:
                row, edit, score, by_entity = (each[reaches] for each in (row, edit, score, by_entity))
                distance = torch.linalg.vector_norm(centre[row] - images[edit].to(centre.dtype), dim=1)
                reaches = Agreement.of(by_entity, distance) >= self.agreement.least(len(images))
            found.append(Claims(row[reaches], edit[reaches], score[reaches]))
        return self._settled(Claims.cat(found), centre, images)

    def _pairs(self, entity: Tensor, relation: Tensor, *known: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs that may be claims, by blocks of stored edits."""
        tables = tables_of(self.model)
        if has_index(self.model, len(known[0])):
            # The sum of both logits, as an inner product, for their product of probabilities
            factors = [abs(each) ** 0.5 for each in self.classifier.slope.tolist()]
            asked = torch.cat([entity * factors[0], relation * factors[1]], 1)
            key = ("classifier", self.stacked.spec.options.get("artifact"))
            yield tables.pairs(key, "ip", self.stacked, asked, list(zip(known, factors, strict=True)))
            return
        reduced = tables.reduced(self.stacked, "entity", known[0])
        yield from pairs_above(entity, known[0], self.classifier.least_entity(self.least), reduced)

    def _settled(self, claims: Claims, asked: Tensor, images: Tensor) -> Claims:
        """What ``settled`` leaves of claims."""
        rows, row = claims.row.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        edits, edit = claims.edit.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        scores = claims.score.new_full((len(rows), len(edits)), -torch.inf)
        scores[row, edit] = claims.score
        stored, answers = images[edits].to(asked.dtype), self.answers.to(edits.device)[edits]
        left = Claims.reaching(settled(scores, self.least, asked[rows], stored, answers), scores.new_tensor(self.least))
        return Claims(rows[left.row], edits[left.edit], left.score)

    def threshold(self, fixed: Mapping[str, Tensor]) -> Tensor:
        """See `Router`."""
        return fixed["entity"].new_full((len(fixed["entity"]),), self.least)


def answer_numbers(answers: Sequence[str | None]) -> Tensor:
    """(B,) int64, equal for equal answers; one that is not known (None) is equal to no other."""
    numbers: dict[str, int] = {}
    known = [-1 - n if text is None else numbers.setdefault(text, len(numbers)) for n, text in enumerate(answers)]
    return torch.tensor(known, dtype=torch.long)


def settled(scores: Tensor, least: float, asked: Tensor, stored: Tensor, answers: Tensor) -> Tensor:
    """Scores in which no two edits claim one prompt.

    Edits of the same question about images that show the same (many pictures of one flag, say) all claim each other's
    prompts, and need not agree. Where one of them was made on the very image that is asked about, it acts, the newest
    of several. Else the claim with the largest score acts, the newest of equal ones, if no other that is as large, but
    for ``MARGIN``, installs another answer; or of those that are as large the one whose image is by far the nearest
    (``RATIO``). Else none acts: what is left is a guess, and the base model's answer stands.

    The score is learned, and sees what an image shows; the distance of images' centres sees how it is rendered, and
    alone would take the right edit for a guess wherever two scenes look alike.

    Args:
        scores: (R, B), logarithms of probabilities, changed in place. least: what an edit needs to claim a prompt.
        asked: (R, d), stored: (B, d), centres of images. answers: (B,) int64, see ``answer_numbers``.
    Returns:
        (R, B), minus infinity at the edits that lost.
    """
    claims = scores >= least
    rows = (claims.sum(1) > 1).nonzero()[:, 0]
    if not len(rows):
        return scores
    edits = claims[rows].any(0).nonzero()[:, 0]
    # (R', B'), of the rows that several claim and the edits that claim any of them
    claimed, given = claims[rows[:, None], edits], scores[rows[:, None], edits]
    distance = torch.cdist(asked[rows], stored[edits], compute_mode="donot_use_mm_for_euclid_dist")
    same = claimed & (distance <= SAME_IMAGE)
    # The claims of edits that were made on this very image, where there are any; else all claims
    level = torch.where(same.any(1, keepdim=True), same, claimed)
    number = torch.arange(len(edits), device=scores.device)
    best = given.masked_fill(~level, -torch.inf)
    # Rounding does not decide between two edits of one question: of those that are as good, the last
    newest = torch.where(level & (best >= best.amax(1, keepdim=True) - 1e-3), number, -1).amax(1)
    odds = log_odds(best)
    rivals = level & (odds >= odds.gather(1, newest[:, None]) - MARGIN)
    disputed = ~same.any(1) & (rivals & (answers[edits] != answers[edits][newest][:, None])).any(1)
    nearby = distance.masked_fill(~rivals, torch.inf).topk(2, dim=1, largest=False)
    is_clear = nearby.values[:, 0] <= RATIO * nearby.values[:, 1]
    winner = torch.where(disputed, torch.where(is_clear, nearby.indices[:, 0], -1), newest)
    kept = ~claimed | (number == winner[:, None])
    scores[rows[:, None], edits] = given.masked_fill(~kept, -torch.inf)
    return scores


def log_odds(scores: Tensor) -> Tensor:
    """log(p / (1 - p)) of log(p), finite but for p = 0."""
    near_one = scores.clamp(max=-1e-6)
    return near_one - torch.log(-torch.expm1(near_one))
