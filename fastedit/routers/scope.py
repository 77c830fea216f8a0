"""Whether a question lies in the scope of a cached edit: the distance of two learned embeddings.

SERAC (arXiv 2206.06520), section 3.2, in the embedding form: ``exp(-||e - e'||^2)`` of the asked and the cached
question. The public multimodal port embeds the text alone with a language model of its own. Ours are two small heads on
states of the frozen model at a fixed depth, where words know their neighbours (word embeddings know none, and what is
trained on them knows no wording but those it has seen): one reads the text tokens, one the image tokens. Squared
distances add, so that an edit acts where question AND image are those of the edit; a question without image is never
near one that has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastedit.backbone import EditableModel, PackedState
from fastedit.backbone.packed import token_indices, token_rows
from fastedit.backbone.packed_forward import packed_prefix
from fastedit.backbone.token_layout import token_layout
from fastedit.routers import Routed
from fastedit.routers.claims import Claims, pairs_within
from fastedit.routers.tables import has_index, tables_of

#: Of the coordinate that keeps questions with and without image apart: exp(-16) is far below any threshold.
APART = 4.0
PREFIX = "scope/"


class Trained(Protocol):
    """A trained part, as far as it is read here (``fastedit.training.Artifact``)."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What the tensors mean."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name."""


@dataclass(frozen=True)
class ScopeShape:
    """Sizes of the heads.

    Args:
        width: d of the states. size: of a head's embedding. hidden: width of a head.
        segments: parts of equal length that an image's tokens are averaged over, in their order.
        sees_image: False compares the text alone.
        dropout: in the heads, while they are trained.
        layer: the states are those that enter this decoder layer, or the first that the delta can reach if that comes
            later.
    """

    width: int
    size: int = 64
    hidden: int = 256
    segments: int = 1
    sees_image: bool = True
    dropout: float = 0.2
    layer: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "size", "hidden", "segments"):
            if getattr(self, name) < 1:
                raise ValueError(f"scope: {name} is at least 1 (got {name}={getattr(self, name)!r})")
        if self.layer < 0:
            raise ValueError(f"scope: layer is at least 0 (got layer={self.layer!r})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"scope: dropout lies in [0, 1) (got dropout={self.dropout!r})")

    @property
    def total(self) -> int:
        """Length of a whole embedding."""
        return 2 * self.size + 1 if self.sees_image else self.size


@dataclass(frozen=True)
class ScopeFeatures:
    """What the heads see of R prompts.

    Args:
        text: (R, 2 d), float32: mean state of the text tokens, state of the last token.
        image: (R, segments * d), float32: mean states of the image's segments, 0 without an image.
        has_image: (R,), float32, 0 or 1.
    """

    text: Tensor
    image: Tensor
    has_image: Tensor

    def __len__(self) -> int:
        return int(self.text.shape[0])

    @property
    def n_bytes(self) -> int:
        """Size of the tensors."""
        return 4 * (self.text.numel() + self.image.numel() + self.has_image.numel())

    def select(self, rows: Sequence[int] | Tensor) -> ScopeFeatures:
        """Some rows, copied."""
        chosen = torch.as_tensor(rows, dtype=torch.long, device=self.text.device)
        return ScopeFeatures(self.text[chosen], self.image[chosen], self.has_image[chosen])

    @staticmethod
    def cat(parts: Sequence[ScopeFeatures]) -> ScopeFeatures:
        """The rows of all parts."""
        return ScopeFeatures(
            torch.cat([part.text for part in parts]),
            torch.cat([part.image for part in parts]),
            torch.cat([part.has_image for part in parts]),
        )


@torch.no_grad()
def scope_features(model: EditableModel, state: PackedState, shape: ScopeShape) -> ScopeFeatures:
    """Features of the prompts of a state: tokens behind them, those of answers, do not count.

    Args:
        model: frozen; it walks to the layer of the shape where the state comes before that. No delta may act.
        state: R rows with all their tokens; the first wanted token of a row ends its prompt.
        shape: of the heads that read the features.
    """
    if state.layer < shape.layer:
        state = packed_prefix(model, state, shape.layer, "attention")
    segments = shape.segments
    hidden, device = state.hidden.float(), state.hidden.device
    rows, width = len(state), hidden.shape[1]
    row = token_rows(state.counts, device)
    lengths = torch.tensor(token_layout(state).prompts, device=device)
    place = token_indices(state, device)
    inside = place < lengths[row]
    image = torch.zeros_like(inside) if state.image is None else state.image
    text = inside & ~image
    mean = _means(hidden[text], row[text], rows)
    first = torch.cumsum(torch.tensor([0, *state.counts], device=device), 0)[:-1]
    last = hidden[first + lengths - 1]
    # Number of a token among those of its image, and how many there are
    count = torch.zeros(rows, dtype=torch.long, device=device).index_add_(0, row[image], image[image].long())
    start = torch.cumsum(count, 0) - count
    number = torch.arange(int(image.sum()), device=device) - start[row[image]]
    segment = row[image] * segments + number * segments // count[row[image]].clamp(min=1)
    parts = _means(hidden[image], segment, rows * segments).view(rows, segments * width)
    return ScopeFeatures(torch.cat([mean, last], 1), parts, (count > 0).float())


def _means(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    """Mean (owners, d) of the values (T, d) of each owner; 0 where it has none."""
    total = values.new_zeros(owners, values.shape[1]).index_add_(0, owner, values)
    count = torch.bincount(owner, minlength=owners).clamp(min=1)
    return total / count[:, None]


class ScopeHeads(nn.Module):
    """Two heads, features -> hidden -> embedding, behind a fixed standardisation of the features.

    Args:
        shape: sizes. seed: of the first weights.
    """

    text_mean: Tensor
    text_scale: Tensor
    image_mean: Tensor
    image_scale: Tensor

    def __init__(self, shape: ScopeShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        widths = {"text": 2 * shape.width}
        if shape.sees_image:
            widths["image"] = shape.segments * shape.width
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterDict()
        for name, width in widths.items():
            self.weights[f"{name}_in"] = nn.Parameter(_drawn(shape.hidden, width, generator))
            self.weights[f"{name}_bias"] = nn.Parameter(torch.zeros(shape.hidden))
            # Small: at the start every question lies in every scope, and gradients flow from both sides
            self.weights[f"{name}_out"] = nn.Parameter(0.1 * _drawn(shape.size, shape.hidden, generator))
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(width))

    @torch.no_grad()
    def standardise(self, features: ScopeFeatures) -> None:
        """Take mean and spread of the features from examples."""
        self._measure("text", features.text)
        if self.shape.sees_image and bool(features.has_image.any()):
            self._measure("image", features.image[features.has_image > 0])

    def _measure(self, name: str, values: Tensor) -> None:
        getattr(self, f"{name}_mean").copy_(values.mean(0))
        # A feature that hardly moves must not be blown up
        spread = values.std(0, unbiased=False)
        getattr(self, f"{name}_scale").copy_(1 / spread.clamp(min=1e-2 * float(spread.mean()) + 1e-6))

    def forward(self, features: ScopeFeatures) -> Tensor:
        """Embeddings (R, shape.total), float32."""
        text = self._head("text", features.text)
        if not self.shape.sees_image:
            return text
        has = features.has_image[:, None]
        return torch.cat([text, self._head("image", features.image) * has, APART * has], 1)

    def _head(self, name: str, values: Tensor) -> Tensor:
        values = (values - getattr(self, f"{name}_mean")) * getattr(self, f"{name}_scale")
        inner = F.linear(values, self.weights[f"{name}_in"], self.weights[f"{name}_bias"])
        inner = F.dropout(F.gelu(inner), self.shape.dropout, self.training)
        return F.linear(inner, self.weights[f"{name}_out"])

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for an artifact."""
        return {PREFIX + name: tensor for name, tensor in self.state_dict().items()}

    def settings(self) -> dict[str, Any]:
        """The shape as plain values, for an artifact's config."""
        return asdict(self.shape)

    @staticmethod
    def of(artifact: Trained, device: torch.device) -> ScopeHeads:
        """The heads that an artifact holds (config "scope" and tensors "scope/..."), frozen."""
        heads = ScopeHeads(ScopeShape(**artifact.config["scope"]))
        known = {n.removeprefix(PREFIX): t for n, t in artifact.tensors.items() if n.startswith(PREFIX)}
        heads.load_state_dict(known)
        return heads.to(device).requires_grad_(False).eval()


def _drawn(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 2 - 1).div(columns**0.5).float()


def squared_distances(asked: Tensor, cached: Tensor) -> Tensor:
    """(R, B) of embeddings (R, E) and (B, E), by differences: the product form loses what is near."""
    return torch.cdist(asked, cached, compute_mode="donot_use_mm_for_euclid_dist").square()


def scope_loss(distance: Tensor, inside: Tensor) -> Tensor:
    """Binary cross-entropy of ``exp(-distance)``, elementwise (SERAC, arXiv 2206.06520, section 3.3).

    Args:
        distance: squared distances, any shape. inside: bool of the same shape.
    """
    # log(1 - exp(-x)) is unbounded at 0, where every gradient would be lost to one pair
    outside = -torch.log(-torch.expm1(-distance.clamp(min=1e-4)))
    return torch.where(inside, distance, outside)


def trained_part(model: EditableModel, options: Mapping[str, Any]) -> Any:
    """The artifact that a delta's options name, from those at the model's disposal.

    Raises:
        ValueError: it is not there.
    """
    name = str(options.get("artifact"))
    if name not in model.artifacts:
        raise ValueError(
            "delta: its trained part is loaded first, with fastedit.load_artifact(path, model) "
            f"(got artifact={name[:12]!r}, loaded {[each[:12] for each in model.artifacts]})"
        )
    return model.artifacts[name]


class ScopeRouter:
    """An edit acts where the similarity of its embedding (fixed tensor "scope") reaches the spec's ``threshold``."""

    def __init__(self, model: EditableModel, stacked: Routed) -> None:
        self.model, self.stacked = model, stacked
        self.heads = ScopeHeads.of(trained_part(model, stacked.spec.options), model.device)
        self.layer = self.heads.shape.layer
        self.least = float(stacked.spec.options.get("threshold", 0.5))

    def scores(self, state: PackedState, fixed: Mapping[str, Tensor], own: Tensor | None) -> Tensor:
        """See `Router`; in 0..1."""
        asked = self.heads(scope_features(self.model, state, self.heads.shape))
        cached = fixed["scope"].to(asked.dtype)
        if own is None:
            return torch.exp(-squared_distances(asked, cached))
        return torch.exp(-(asked - cached[own]).square().sum(1))

    def claims(self, state: PackedState, fixed: Mapping[str, Tensor]) -> Claims:
        """See `fastedit.routers.claims.Claiming`."""
        asked = self.heads(scope_features(self.model, state, self.heads.shape))
        cached = fixed["scope"].to(asked.dtype)
        # exp(-d²) >= least, and a little more
        radius = max(0.0, -math.log(max(self.least, 1e-30))) ** 0.5 * (1 + 1e-5) + 1e-5
        tables = tables_of(self.model)
        if has_index(self.model, len(cached)):
            key = ("scope", self.stacked.spec.options.get("artifact"))
            pairs = iter([tables.pairs(key, "l2", self.stacked, asked, [(cached, 1.0)])])
        else:
            reduced = tables.reduced(self.stacked, "scope", cached, centred=True, exact=True)
            pairs = pairs_within(asked, cached, radius, reduced)
        found = []
        for row, edit in pairs:
            score = torch.exp(-(asked[row] - cached[edit]).square().sum(1))
            reaches = score >= self.least
            found.append(Claims(row[reaches], edit[reaches], score[reaches]))
        return Claims.cat(found)

    def threshold(self, fixed: Mapping[str, Tensor]) -> Tensor:
        """See `Router`."""
        return fixed["scope"].new_full((len(fixed["scope"]),), self.least)
