"""Networks that turn the gradient of an edit into a low-rank change: what MEND and KE share.

A target linear map with input x_t (d_in) and output gradient g_t (d_out) at token t has the weight gradient
``Σ_t g_t x_tᵀ`` (MEND, arXiv 2110.11309, section 3.2). Nothing here ever forms it: gradients stay lists of pairs, and
changes are ``up (d_out, r) @ down (r, d_in)`` factors with a rank of about the number of tokens. Weights are not read
either, so a quantized base serves as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastedit.backbone import EditableModel, PackedState, Site
from fastedit.backbone.context import scoped_hooks
from fastedit.backbone.packed import token_rows
from fastedit.backbone.packed_forward import packed_tail
from fastedit.deltas import DeltaSpec, Rows
from fastedit.deltas.rows import TokenSpans
from fastedit.fitting.prepared import EditRows
from fastedit.methods.base import ComputedDelta, last_layers, positions_option
from fastedit.objectives import Role
from fastedit.ops import low_rank, risk
from fastedit.requests import EditRequest
from fastedit.training import Artifact

#: Ranks that a memory plan reckons with; an edit has as many as it has tokens that the change acts on.
PLANNED_RANK = 32
#: Share of the mean variance that is added to that of every direction.
RIDGE = 1e-2
#: (B, d_in, r) and (B, r, d_out) of one site: the change is ``x @ down @ up``.
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gradients:
    """Inputs and output gradients of the target linear maps for B edits, N being the most tokens of an edit.

    Tokens whose input or gradient is zero are left out (they change no weight); what is filled up is zero.

    Args:
        x: by site, (B, N, d_in) float32. grad: by site, (B, N, d_out) float32. N may differ by site.
        mask: by site, (B, N) bool, where there is a token.
        nll: (B,) float32, mean over each target's tokens before the edit.
    """

    x: tuple[Tensor, ...]
    grad: tuple[Tensor, ...]
    mask: tuple[Tensor, ...]
    nll: Tensor


class HyperNetwork(Protocol):
    """A module from gradients to factors; parameters and buffers are what an artifact keeps."""

    def __call__(self, gradients: Gradients, requests: Sequence[EditRequest]) -> list[Factors]:
        """Factors of the change, by site; differentiable in the network's parameters."""


def edit_gradients(model: EditableModel, sites: Sequence[Site], rows: Sequence[EditRows]) -> Gradients:
    """Gradients of the target NLL of every edit at the outputs of the target maps, on the model as it acts now.

    The NLL is summed over a target's tokens. With the mean, as in the multimodal ports, a token of a long target weighs
    less than one of a short target, and a network that sees one token at a time cannot make up for it.

    Args:
        model: frozen; deltas that are installed are part of it.
        sites: target linear maps, none before the point that the rows are at.
        rows: of B edits; only their edit view is used.
    """
    views = [_edit_view(each) for each in rows]
    state = PackedState.cat([view for view, _ in views])
    labels = torch.cat([labels_of_row for _, labels_of_row in views])
    edit = token_rows([len(labels_of_row) for _, labels_of_row in views], labels.device)
    seen: dict[int, tuple[Tensor, Tensor, tuple[int, ...]]] = {}

    def keep(index: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).to(labels.device)
            # Weights are frozen: the gradient of an output is that of a zero added to it
            zero = torch.zeros_like(output, requires_grad=True)
            assert model.running is not None
            seen[index] = (x, zero, model.running.layouts[x.shape[0]].counts)
            return output + zero

        return hook

    hooks = {model.module(site): keep(index) for index, site in enumerate(sites)}
    with scoped_hooks(hooks), torch.enable_grad():
        logits = model.head(packed_tail(model, state))
        nll, _ = risk(logits, labels, edit, len(rows), kind="ce")
        zeros = [seen[index][1] for index in range(len(sites))]
        lengths = torch.bincount(edit, minlength=len(rows))
        # Edits share no token, so the gradient of the sum is each edit's own
        found = torch.autograd.grad((nll * lengths).sum(), zeros)
    padded = [
        _without_zeros(seen[index][0], grad.reshape(-1, grad.shape[-1]).to(labels.device), seen[index][2])
        for index, grad in enumerate(found)
    ]
    x, grad, mask = zip(*padded, strict=True)
    return Gradients(x, grad, mask, nll.detach().float())


def _edit_view(rows: EditRows) -> tuple[PackedState, Tensor]:
    """The row of the edit itself, with its labels."""
    roles = rows.row_roles or (int(Role.EDIT),) * len(rows.state)
    number = roles.index(int(Role.EDIT))
    return rows.state.of_row(number), rows.labels[rows.role == int(Role.EDIT)]


def _without_zeros(x: Tensor, grad: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Packed tokens (T, d) by row, without those that are zero: (B, N, d_in), (B, N, d_out), (B, N) bool."""
    kept = (x != 0).any(1) & (grad != 0).any(1)
    row = token_rows(counts, x.device)[kept]
    number = torch.bincount(row, minlength=len(counts))
    width = max(1, int(number.max()))
    column = torch.arange(len(row), device=x.device) - (number.cumsum(0) - number)[row]
    filled = []
    for values in (x, grad):
        out = torch.zeros(len(counts), width, values.shape[1], device=x.device)
        out[row, column] = values[kept].float()
        filled.append(out)
    mask = torch.zeros(len(counts), width, dtype=torch.bool, device=x.device)
    mask[row, column] = True
    return filled[0], filled[1], mask


class Acting:
    """Factors as a delta that ``installed`` can let act, with gradients through them (a ``StackedDelta``).

    Args:
        spec: sites and positions.
        factors: by site, of B edits.
    """

    def __init__(self, spec: DeltaSpec, factors: Sequence[Factors]) -> None:
        self.spec, self.factors = spec, factors
        self.size = int(factors[0][0].shape[0])
        self.fixed: dict[str, Tensor] = {}
        self.texts: list[Mapping[str, str]] = [{}] * self.size
        self.row_roles: tuple[int, ...] = ()

    def bind(self, model: EditableModel) -> None:
        """Nothing is needed of the model."""

    def reader(self, site: int) -> str | None:
        """The site's own input."""
        return None

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, output: Tensor) -> Tensor:
        """Change (tokens, d_out) for tokens sorted by edit."""
        down, up = self.factors[site]
        offsets = rows.offsets_tensor(x.shape[0], self.size, x.device)
        narrow = x.dtype in (torch.bfloat16, torch.float16)
        return low_rank(x if narrow else x.to(down.dtype), down, up, offsets)


def sketch(factors: Sequence[Factors], width: int = 16, seed: int = 0) -> Tensor:
    """A differentiable summary (B, P) of changes, of one length whatever their ranks.

    Each site's change W is seen through fixed random matrices, ``R W S`` (width, width) with entries of variance
    1/width, so that its expected squared norm is that of W: what an objective reads that is a function of the delta.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for down, up in factors:
        left = torch.randn(down.shape[1], width, generator=generator).to(down) / width**0.5
        right = torch.randn(up.shape[2], width, generator=generator).to(up) / width**0.5
        parts.append(((left.T @ down) @ (up @ right)).flatten(1))
    return torch.cat(parts, 1)


def changed_layers(layers: int | tuple[int, ...] | None, model: EditableModel, owner: str) -> tuple[int, ...]:
    """Layer numbers; None is the last tenth of the decoder, at least one.

    Raises:
        ValueError: a layer that the model does not have.
    """
    return last_layers(max(1, round(model.n_layers / 10)) if layers is None else layers, model.n_layers, owner)


def planned_spec(sites: Sequence[Site], positions: str) -> DeltaSpec:
    """Low-rank deltas at some sites, before anything is known of the edits."""
    return DeltaSpec("low_rank", tuple(sites), {"rank": PLANNED_RANK, "scale": 1.0, **positions_option(positions)})


def computed(spec: DeltaSpec, factors: Sequence[Factors]) -> list[ComputedDelta]:
    """Factors of B edits as the parts of low-rank deltas, each as wide as its edit needs."""
    made = []
    for edit in range(factors[0][0].shape[0]):
        # Tokens that were filled up have zero factors; they come last
        used = [(up[edit] != 0).any(1) & (down[edit] != 0).any(0) for down, up in factors]
        rank = max([1, *(int(each.nonzero().max()) + 1 for each in used if bool(each.any()))])
        tensors = {}
        for site, (down, up) in zip(spec.sites, factors, strict=True):
            # A site with fewer tokens than another is filled up to one rank
            missing = max(0, rank - down.shape[2])
            name = f"{site.layer}.{site.name}"
            tensors[f"{name}:down"] = nn.functional.pad(down[edit].detach(), (0, missing))[:, :rank]
            tensors[f"{name}:up"] = nn.functional.pad(up[edit].detach(), (0, 0, 0, missing))[:rank]
        made.append(ComputedDelta(tensors, options={"rank": rank, "scale": 1.0}))
    return made


class Scale(nn.Module):
    """Brings one site's inputs or gradients to size one, by statistics over the tokens of many edits.

    MEND, section 3.2, divides every dimension by its deviation, estimated while it trains. Ours: the base is frozen and
    so are these statistics: they are taken once before training, and no step sees unfinished ones. And on request whole
    directions are brought to size one, not dimensions: what tells two targets or two images apart is small beside what
    they share, and a network that is handed both at their sizes learns the difference late.

    Of fewer than 2 d tokens the strengths are shrunk towards their mean (Ledoit and Wolf, 2004), the more the fewer
    there are: a direction that few tokens happen not to have would else be blown up in every edit that has it.

    Args:
        width: d.
        directions: how many directions are scaled each by itself, the others alike; 0 scales dimensions.
    """

    deviation: Tensor
    basis: Tensor
    gain: Tensor

    def __init__(self, width: int, directions: int = 0) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("basis", torch.zeros(min(width, directions), width))
        self.register_buffer("gain", torch.zeros(min(width, directions)))

    def measure(self, tokens: Tensor) -> None:
        """Take the statistics of (T, d), T at least 2; a dimension that is always zero is left as it is.

        Raises:
            ValueError: fewer tokens.
        """
        if tokens.shape[0] < 2:
            raise ValueError(f"hypernet: statistics need at least 2 tokens (got {tokens.shape[0]})")
        exact = tokens.double()
        squares = exact.square().mean(0)
        if not len(self.gain):
            self.deviation.copy_(torch.where(squares > 0, squares.sqrt(), 1.0))
            return
        # Evenly spaced tokens: enough of them for the directions, and the cost is bounded
        some = exact[:: max(1, tokens.shape[0] // max(1024, 8 * len(self.gain)))]
        squares = some.square().mean(0)
        _, values, basis = torch.linalg.svd(some, full_matrices=False)
        found = min(len(self.gain), len(values))
        strengths = values[:found].square() / len(some)
        mean = float(squares.mean())
        ridge = RIDGE * mean or 1.0
        left = max(0.0, float(squares.sum() - strengths.sum())) / max(1, tokens.shape[1] - found)
        doubt = max(0.0, 1 - len(some) / (2 * tokens.shape[1]))
        strengths, left = torch.lerp(strengths, torch.full_like(strengths, mean), doubt), left + doubt * (mean - left)
        rest = (left + ridge) ** -0.5
        self.deviation.fill_(1 / rest)
        self.basis.zero_()
        self.gain.zero_()
        self.basis[:found] = basis[:found].float()
        self.gain[:found] = ((strengths + ridge).rsqrt() - rest).float()

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., d) at size one."""
        scaled = tokens / self.deviation
        return scaled + ((tokens @ self.basis.T) * self.gain) @ self.basis if len(self.gain) else scaled


def restore(network: nn.Module, artifact: Artifact, owner: str) -> None:
    """Write an artifact's tensors into a network.

    Raises:
        ValueError: its settings were others: names the first tensor that differs.
    """
    expected = network.state_dict()
    for name in itertools.chain(expected, artifact.tensors):
        here, there = expected.get(name), artifact.tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (there, here)]
            raise ValueError(
                f"{owner}: the artifact has the shape of these settings; pass those it was trained with, or train "
                f"again (got {name}={shapes[0]}, now {shapes[1]}; trained with {dict(artifact.config)})"
            )
    network.load_state_dict(dict(artifact.tensors))
