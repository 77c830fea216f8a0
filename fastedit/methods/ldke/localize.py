"""Fast localization: which layers hold what an edit is about, from one forward and one backward pass of activations.

LDKE (arXiv 2605.29826) names the step; only its abstract was to be had, so scores and choice are ours. Every candidate
layer's feed-forward output u and its gradient g under the target's NLL are looked at, token by token; no gradient of a
weight is ever formed. A layer counts for an edit as far as all its views agree on it (the edit, rephrased in text and
in image), and less where questions that must not change need it too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, PackedState, Site
from fastedit.backbone.context import scoped_hooks
from fastedit.backbone.packed import token_rows
from fastedit.backbone.packed_forward import packed_tail
from fastedit.fitting.prepared import EditRows
from fastedit.objectives import Role
from fastedit.ops import risk

SCORES = ("activation", "weight")
GROUPS = ("last", "answer", "image")


@dataclass(frozen=True)
class Traced:
    """What one linear map read, put out and was blamed for, at T tokens of R rows.

    Args:
        x: (T, d_in). output: (T, d_out). grad: (T, d_out), of the sum over rows of their mean NLL.
        row: (T,) int64. group: (T,) int64, index into ``GROUPS``, or -1.
    """

    x: Tensor
    output: Tensor
    grad: Tensor
    row: Tensor
    group: Tensor


def trace(model: EditableModel, sites: Sequence[Site], state: PackedState, labels: Tensor) -> list[Traced]:
    """Walk rows to the end and back once, and return what happened at each site.

    Rows share no token, so that the gradient at a token is that of its own row's mean NLL. The last layer is computed
    at the tokens that carry labels alone: elsewhere its gradient is zero.

    Args:
        model: frozen; no delta may act.
        sites: linear maps, none before the point of the state.
        labels: (M,) int64, of the wanted tokens.
    """
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # Weights are frozen: the gradient of an output is that of a zero added to it
            zero = torch.zeros_like(output, requires_grad=True)
            seen[index] = (args[0].detach(), output.detach(), zero)
            return output + zero

        return hook

    owner = token_rows(state.wanted_counts, labels.device)
    hooks = {model.module(site): keep(index) for index, site in enumerate(sites)}
    with scoped_hooks(hooks), torch.enable_grad():
        logits = model.head(packed_tail(model, state))
        nll, _ = risk(logits, labels, owner, len(state), kind="ce")
        grads = torch.autograd.grad(nll.sum(), [seen[index][2] for index in range(len(sites))])
    group = _groups(state)
    made = []
    for index, grad in enumerate(grads):
        x, output, grad = (part.reshape(-1, part.shape[-1]).to(labels.device) for part in (*seen[index][:2], grad))
        whole = x.shape[0] == state.hidden.shape[0]
        made.append(
            Traced(
                x,
                output,
                grad,
                token_rows(state.counts, labels.device) if whole else owner,
                group if whole else group[state.wanted],
            )
        )
    return made


def _groups(state: PackedState) -> Tensor:
    """(T,) int64: what each token is, index into ``GROUPS``."""
    group = torch.full((state.hidden.shape[0],), -1, dtype=torch.long, device=state.hidden.device)
    if state.image is not None:
        group[state.image] = GROUPS.index("image")
    group[state.wanted] = GROUPS.index("answer")
    counts = torch.tensor(state.wanted_counts, device=group.device)
    firsts = (counts.cumsum(0) - counts)[counts > 0]
    group[state.wanted[firsts]] = GROUPS.index("last")
    return group


def gradient_times_activation(traced: Traced, rows: int, groups: Sequence[str] = GROUPS) -> Tensor:
    """(R,): sum over the tokens of some groups of |<u, g>|, the first-order effect of switching the layer off there."""
    chosen = _chosen(traced, groups)
    effect = (_wide(traced.output[chosen]) * _wide(traced.grad[chosen])).sum(1).abs()
    return effect.new_zeros(rows).index_add_(0, traced.row[chosen], effect)


def weight_gradient_norm(traced: Traced, rows: int, groups: Sequence[str] | None = None) -> Tensor:
    """(R,): Frobenius norm of the gradient of the site's weight under each row's NLL, which is never formed.

    ||G^T X||^2 = sum of (X X^T) * (G G^T) over pairs of tokens: a row's tokens are fewer than a layer is wide.

    Args:
        groups: of the tokens that count; None is all, the gradient of the whole loss.
    """
    chosen = torch.ones_like(traced.row, dtype=torch.bool) if groups is None else _chosen(traced, groups)
    x, grad, owner = _wide(traced.x[chosen]), _wide(traced.grad[chosen]), traced.row[chosen]
    counts = torch.bincount(owner, minlength=rows)
    # A row's tokens lie behind one another: theirs begins where those of the rows before end
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    longest = int(counts.amax()) if rows else 0
    pairs = grad.new_ones(rows, longest, longest)
    for values in (x, grad):
        padded = values.new_zeros(rows, longest, values.shape[-1])
        padded[owner, place] = values
        pairs *= padded @ padded.transpose(1, 2)
    return pairs.sum((1, 2)).clamp(min=0).sqrt()


def _wide(values: Tensor) -> Tensor:
    """In float32 at least: sums of half-precision products lose what they are about."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _chosen(traced: Traced, groups: Sequence[str]) -> Tensor:
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise ValueError(f"localize: groups are of {list(GROUPS)} (got groups={list(groups)})")
    wanted = torch.tensor([GROUPS.index(name) for name in groups], device=traced.group.device)
    return torch.isin(traced.group, wanted)


def layer_scores(
    model: EditableModel,
    sites: Sequence[Site],
    rows: Sequence[EditRows],
    *,
    score: str = "activation",
    groups: Sequence[str] = GROUPS,
    probes: float = 0.5,
) -> Tensor:
    """(B, L) how much each of L candidate layers is the edit's: the higher, the more.

    Scores of a view are shares of their sum over the layers, each group of tokens for itself, as an image's many tokens
    speak of other layers than the one that an answer begins at. Then comes the mean over the views that are to change,
    minus ``probes`` times the mean over those that are to stay (as they answer now, where a KL would have no gradient).

    Args:
        model: frozen; no delta may act.
        sites: one per candidate layer, the modules that end the feed-forward blocks.
        rows: of B edits, at or before the first site.
        score: "activation" or "weight". groups: tokens that count for "activation".
    """
    if score not in SCORES:
        raise ValueError(f"localize: score is one of {list(SCORES)} (got score={score!r})")
    state = PackedState.cat([each.state for each in rows])
    labels = torch.cat([each.labels for each in rows])
    size = len(state)
    found = trace(model, sites, state, labels)
    if score == "weight":
        shares = _shares([torch.stack([weight_gradient_norm(traced, size) for traced in found], 1)])
    else:
        tables = [[gradient_times_activation(traced, size, [group]) for traced in found] for group in groups]
        shares = _shares([torch.stack(columns, 1) for columns in tables])
    roles = torch.tensor([role for each in rows for role in each.row_roles], device=shares.device)
    edit = token_rows([len(each.state) for each in rows], shares.device)
    stays = roles >= int(Role.TEXT_LOCALITY)
    return _mean_by(shares[~stays], edit[~stays], len(rows)) - probes * _mean_by(shares[stays], edit[stays], len(rows))


def _shares(tables: Sequence[Tensor]) -> Tensor:
    """(R, L) of (R, L) scores by group of tokens: shares of the sum over the layers, mean over the groups of a row."""
    wide = torch.stack(list(tables)).double()
    total = wide.sum(2, keepdim=True)
    there = total > 0
    shares = torch.where(there, wide / total.clamp(min=torch.finfo(wide.dtype).tiny), 0.0)
    return shares.sum(0) / there.sum(0).clamp(min=1)


def _mean_by(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    total = values.new_zeros(owners, values.shape[1]).index_add_(0, owner, values)
    return total / torch.bincount(owner, minlength=owners).clamp(min=1)[:, None]


def best_layers(scores: Tensor, count: int, *, window: bool = False) -> list[tuple[int, ...]]:
    """By edit, the ``count`` candidates of the highest scores (B, L), rising; with ``window`` the best neighbours.

    Raises:
        ValueError: more than there are.
    """
    size = scores.shape[1]
    if not 1 <= count <= size:
        raise ValueError(f"localize: count is 1 to {size}, the number of candidates (got count={count})")
    if window:
        starts = scores.unfold(1, count, 1).sum(2).argmax(1).tolist()
        return [tuple(range(start, start + count)) for start in starts]
    return [tuple(sorted(layers)) for layers in scores.topk(count, dim=1).indices.tolist()]


def voted_layers(scores: Tensor, count: int, *, window: bool = False) -> tuple[int, ...]:
    """One set for all: the candidates that most edits' own sets hold; the higher mean score decides between equals."""
    votes = torch.zeros_like(scores[0])
    for layers in best_layers(scores, count, window=window):
        votes[list(layers)] += 1
    mean = scores.mean(0)
    if window:
        return best_layers((votes + 1e-6 * mean)[None], count, window=True)[0]
    ranked = sorted(range(len(votes)), key=lambda layer: (-float(votes[layer]), -float(mean[layer])))
    return tuple(sorted(ranked[:count]))


def random_layers(size: int, count: int, seed: str) -> tuple[int, ...]:
    """A control: so many of the candidates by lot."""
    return tuple(sorted(random.Random(seed).sample(range(size), count)))


def brute_force(quality: Callable[[tuple[int, ...]], float], size: int, count: int) -> dict[tuple[int, ...], float]:
    """A control: every set of ``count`` candidates with what a fit on it is worth, best first."""
    found = {chosen: quality(chosen) for chosen in itertools.combinations(range(size), count)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
