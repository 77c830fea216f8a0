"""UniKE's trained part: a memory of hidden states of right answers, and encoders that tell truth from meaning."""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastedit.backbone import EditableModel, Site
from fastedit.data.images import image_key
from fastedit.deltas.attention_memory import encode
from fastedit.methods.captured import answer_inputs
from fastedit.requests import EditRequest, Query
from fastedit.training import Artifact, TrainerConfig, processes

ENCODERS = ("enc_sem", "enc_tru")
#: Names of the states of a triplet, as they stand in the artifact.
STATES = ("semantic", "positive", "negative", "reworded")


@dataclass(frozen=True)
class Triplet:
    """A question, the same asked otherwise, its right answer and a wrong one."""

    question: Query
    again: Query
    right: str
    wrong: str


def triplets(records: Sequence[EditRequest], truth: str, most: int, seed: int) -> list[Triplet]:
    """Questions about images with a right and a wrong answer (UniKE, arXiv 2409.19872, section 3.3).

    The paper asks a model over 15,000 questions and takes its own mistakes as the wrong answers. Here a record's
    question has the model's answer and the edit's target, one of which is right; of its other image question, where
    only the right answer is recorded, a wrong one is what the same question has for another image.

    Args:
        records: to learn from. truth: "prediction" where edits are counterfactual, "target" where they correct the
            model. most: triplets. seed: of their choice and of the wrong answers that are drawn.
    """
    rng = random.Random(seed)
    answers: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.image_locality_prompt and record.image_locality_answer:
            answers[record.image_locality_prompt].add(record.image_locality_answer)
    found = []
    for record in records:
        said = (record.prediction or "").strip()
        if record.image is not None and said and said != record.target:
            right, wrong = (said, record.target) if truth == "prediction" else (record.target, said)
            again = Query(record.rephrase or record.prompt, record.image_rephrase or record.image)
            found.append(Triplet(Query(record.prompt, record.image), again, right, wrong))
        other, answer = record.image_locality_prompt, record.image_locality_answer
        if other and answer and record.image_locality_image is not None:
            wrongs = sorted(answers[other] - {answer})
            if wrongs:
                question = Query(other, record.image_locality_image)
                found.append(Triplet(question, question, answer, rng.choice(wrongs)))
    rng.shuffle(found)
    return found[:most]


def states_of(model: EditableModel, found: Sequence[Triplet], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Inputs of the attention blocks, float32 (M, d), by ``"{layer}:{name}"``.

    "semantic" is that of the last token of the question and "reworded" of the same asked otherwise; "positive" and
    "negative" are those of the last token of the right and of the wrong answer. States are what the query map reads,
    so those of a layer behind its norm.
    """
    kept: dict[str, list[Tensor]] = {f"{site.layer}:{name}": [] for site in sites for name in STATES}
    asked = {
        "positive": [replace(t.question, answer=t.right) for t in found],
        "negative": [replace(t.question, answer=t.wrong) for t in found],
        "reworded": [replace(t.again, answer=t.right) for t in found],
    }
    for name, queries in asked.items():
        for inputs, counts in answer_inputs(model, queries, sites):
            ends = torch.tensor(counts, device=model.device).cumsum(0)
            first = ends - torch.tensor(counts, device=model.device)
            for site in sites:
                kept[f"{site.layer}:{name}"].append(inputs[site][first if name == "reworded" else ends - 1].float())
                if name == "positive":
                    kept[f"{site.layer}:semantic"].append(inputs[site][first].float())
    return {key: torch.cat(parts) for key, parts in kept.items()}


def _walked(model: EditableModel, found: Sequence[Triplet], sites: Sequence[Site]) -> dict[str, Tensor]:
    """States of all triplets; of several processes each walks a part of them."""
    start, end = processes.bounds(len(found))
    states = states_of(model, found[start:end], sites)
    return {key: processes.gathered(values, start, len(found)) for key, values in states.items()}


class KnowledgeTask:
    """The encoders of every layer as a training ``Task``: contrastive losses on stored states.

    UniKE, arXiv 2409.19872, section 3.4: in the truthful space right answers lie with right ones and wrong with wrong
    ones; in the semantic space a question lies with its own answers, right or wrong. The paper leaves similarity,
    temperature and sizes open: cosines over 0.07, and two linear maps with GELU between. Ours besides: in the semantic
    space a question lies with the same one asked otherwise.

    Args:
        model: frozen. sites: the query maps of the layers.
        found: triplets to learn from. held: how many of them, the last, are kept for validation.
        trainer: settings of the loop; its batch is one of triplets.
        width: of the codes. temperature: of the similarities.
    Raises:
        ValueError: fewer than two triplets to learn from.
    """

    name = "unike"

    def __init__(
        self,
        model: EditableModel,
        sites: Sequence[Site],
        found: Sequence[Triplet],
        trainer: TrainerConfig,
        *,
        held: int,
        width: int,
        temperature: float,
    ) -> None:
        self.count, self.held = len(found), min(held, len(found) // 4)
        if self.count - self.held < 2:
            raise ValueError(
                "unike: records have questions about images with a right and a wrong answer, at least two "
                f"(got {self.count} triplets, held={self.held})"
            )
        self._model, self._layers = model, [site.layer for site in sites]
        self.states = _walked(model, found, sites)
        self.temperature, self.batch = temperature, max(2, trainer.batch_size)
        self.config = {"width": width, "temperature": temperature, "triplets": self.count, "layers": self._layers}
        self.fingerprint = f"{model.fingerprint}:{self.config}:{_digest(found)}"
        self._weights = self._drawn(width, trainer.seed)

    def parameters(self) -> Mapping[str, Tensor]:
        """Weights and biases by name: ``"{layer}:{encoder}.{number}"``."""
        return self._weights

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """Both losses on a batch of triplets, summed over layers."""
        chosen = torch.randperm(self.count - self.held)[: self.batch].to(self._model.device)
        parts = [self._losses(layer, chosen) for layer in self._layers]
        semantic, truthful = (torch.stack(each).sum() for each in zip(*parts, strict=True))
        count = len(self._layers)
        losses = {"semantic": float(semantic.detach()) / count, "truthful": float(truthful.detach()) / count}
        return semantic + truthful, losses

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """On held triplets, means over layers: how often truth is told, and how often a question finds its answer."""
        held = torch.arange(self.count - self.held, self.count, device=self._model.device)
        if not self.held:
            return {"score": 0.0}
        truths, finds = [], []
        for layer in self._layers:
            right, wrong = (self._encoded(layer, "enc_tru", name, None) for name in ("positive", "negative"))
            axis = functional.normalize(right[: -self.held].mean(0) - wrong[: -self.held].mean(0), dim=0)
            middle = 0.5 * (right[: -self.held].mean(0) + wrong[: -self.held].mean(0)) @ axis
            truths.append(
                0.5 * ((right[held] @ axis > middle).double() + (wrong[held] @ axis < middle).double()).mean()
            )
            asked, answered = (self._encoded(layer, "enc_sem", name, held) for name in ("semantic", "positive"))
            finds.append(
                ((asked @ answered.T).argmax(1) == torch.arange(self.held, device=asked.device)).double().mean()
            )
        truthful, semantic = float(torch.stack(truths).mean()), float(torch.stack(finds).mean())
        return {"score": 0.5 * (truthful + semantic), "truthful": truthful, "semantic": semantic}

    @torch.no_grad()
    def result(self) -> Artifact:
        """Memory, encoders, and the directions of truth and meaning in the space of hidden states."""
        kept = {name: states for name, states in self.states.items() if not name.endswith(":reworded")}
        tensors = {**kept, **self._weights}
        for layer in self._layers:
            for name, encoder in (("truthfulness", "enc_tru"), ("semantic", "enc_sem")):
                tensors[f"{layer}:direction.{name}"] = self._direction(layer, encoder)
        return Artifact(self.name, self._model.fingerprint, self.config, tensors)

    def _direction(self, layer: int, encoder: str) -> Tensor:
        """(d,), root mean square 1: from wrong to right answers in an encoder's space, mapped back to hidden states.

        zeta of the paper is the difference of the means; the map is a ridge regression of states on encoded states.
        """
        weights = [self._weights[f"{layer}:{encoder}.{number}"] for number in range(4)]
        right, wrong = (self.states[f"{layer}:{name}"] for name in ("positive", "negative"))
        states = torch.cat([right, wrong]).double()
        codes = encode(torch.cat([right, wrong]), weights).double()
        centred = codes - codes.mean(0)
        ridge = 1e-2 * centred.square().sum() / centred.shape[1] * torch.eye(centred.shape[1]).to(centred)
        back = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (states - states.mean(0)))
        zeta = codes[: len(right)].mean(0) - codes[len(right) :].mean(0)
        return unit_rms(zeta @ back).float()

    def _losses(self, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
        right, wrong = (self._shared(layer, "enc_tru", name, chosen) for name in ("positive", "negative"))
        truthful = truthful_loss(right, wrong, self.temperature)
        asked, right, wrong, again = (self._shared(layer, "enc_sem", name, chosen) for name in STATES)
        semantic = semantic_loss(asked, right, wrong, self.temperature)
        return semantic + same_loss(asked, again, self.temperature), truthful

    def _encoded(self, layer: int, encoder: str, name: str, chosen: Tensor | None) -> Tensor:
        """Encoded states of length 1, (N, e)."""
        states = self.states[f"{layer}:{name}"]
        weights = [self._weights[f"{layer}:{encoder}.{number}"] for number in range(4)]
        return functional.normalize(encode(states if chosen is None else states[chosen], weights), dim=1)

    def _shared(self, layer: int, encoder: str, name: str, chosen: Tensor) -> Tensor:
        """The same of a step's states; of several processes each encodes a part of them."""
        start, end = processes.bounds(len(chosen))
        return processes.gathered(self._encoded(layer, encoder, name, chosen[start:end]), start, len(chosen))

    def _drawn(self, width: int, seed: int) -> dict[str, Tensor]:
        """First weights: uniform with variance 1 / (3 d_in); biases 0."""
        generator = torch.Generator().manual_seed(seed)
        d = self._model.hidden_size
        made: dict[str, Tensor] = {}
        for layer in self._layers:
            for encoder in ENCODERS:
                for number, shape in enumerate(((d, d), (d,), (d, width), (width,))):
                    draw = torch.rand(shape, generator=generator) * 2 - 1 if len(shape) > 1 else torch.zeros(shape)
                    value = (draw * shape[0] ** -0.5).to(self._model.device)
                    made[f"{layer}:{encoder}.{number}"] = value.requires_grad_()
        return made


def truthful_loss(right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """Scalar: right and wrong answers (N, e), of length 1, as two classes, each state to be found by its class.

    UniKE, section 3.4: for an anchor of a class, minus the log of the share that its class has of the similarities to
    all states. Ours: without the anchor itself, whose similarity is constant.
    """
    both = torch.cat([right, wrong])
    scores = (both @ both.T) / temperature
    scores = scores.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
    label = torch.arange(len(both), device=both.device) < len(right)
    same = scores.masked_fill(label[:, None] != label[None, :], -torch.inf)
    return (torch.logsumexp(scores, 1) - torch.logsumexp(same, 1)).mean()


def semantic_loss(asked: Tensor, right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """Scalar: questions (N, e) find their own two answers among all (UniKE, section 3.4); codes of length 1."""
    scores = torch.cat([asked @ right.T, asked @ wrong.T], 1) / temperature
    n = len(asked)
    matching = torch.stack([scores.diagonal(), scores.diagonal(n)], 1)
    return (torch.logsumexp(scores, 1) - torch.logsumexp(matching, 1)).mean()


def same_loss(asked: Tensor, again: Tensor, temperature: float) -> Tensor:
    """Scalar: questions (N, e) find the same asked otherwise among all, and it finds them; codes of length 1."""
    scores = asked @ again.T / temperature
    label = torch.arange(len(asked), device=asked.device)
    return 0.5 * (functional.cross_entropy(scores, label) + functional.cross_entropy(scores.T, label))


def unit_rms(vector: Tensor) -> Tensor:
    """The vector (d,) scaled to root mean square 1; zeros stay."""
    return vector / vector.square().mean().sqrt().clamp(min=1e-12)


def _digest(found: Sequence[Triplet]) -> str:
    parts = [[t.question.prompt, image_key(t.question.image or ""), t.right, t.wrong] for t in found]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
