"""A side copy of one linear map, fitted inside a random part of its entries, and copies merged into one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastedit.deltas.base import DeltaSpec, EditDelta, StackedDelta
from fastedit.deltas.full import FullDelta, accumulate_full
from fastedit.deltas.options import SideOptions, options_of
from fastedit.deltas.questions import joined_questions
from fastedit.deltas.random_mask import dropped_entries
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.deltas.scope import RowMarks, in_scope, row_marks


class SideDelta(FullDelta):
    """What a side memory differs by from the frozen weight it is a copy of: ``y += x @ delta.T``.

    WISE, arXiv 2405.14768. The weight itself is never read, so it may be quantized. Gradients are kept where a random
    mask has a one, which follows from the edit (``random_mask``). How far an input moves is the distance between the
    activations behind the map, ``||silu(x W0) - silu(x (W0 + delta))||``, averaged over tokens of the prompt (equation
    (3)); the mean norm of the frozen ones over the edit's own prompt is its unit, so that margins need not know the
    model. While it is fitted, margins part the rows of the edit from those that must not change (equation (5)), and
    when it is done, the smallest distance of a row of the edit, times a share, is where it begins to act.

    Options of the spec:
        keep: share of the entries that are fitted.
        tokens: tokens of a prompt that are averaged over, one of ``scope.TOKENS``.
        alpha, beta, gamma: margins in units; rows that must not change move less than alpha, rows of the edit more than
            beta, and these by gamma more than those.
        weight: of the margins in the loss.
        share: of the smallest distance, from which on it acts.
    Parts: ``"{layer}.{name}:delta"`` (B, d_out, d_in).
    Fixed, after ``"{layer}.{name}:"``: ``mask`` (B, 4), key of the mask; ``unit`` (B, 1); ``threshold`` (B, 1);
    ``edits`` (B, 1), how many it holds; ``merged`` (B, 1), 1 for a merged memory.

    Raises:
        ValueError: not exactly one site.
    """

    # The mask is applied to them
    keeps_outer = False

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        if len(spec.sites) != 1:
            raise ValueError(f"side: a copy of one linear map (got sites={[site.module_path for site in spec.sites]})")
        super().__init__(spec, size, dtype=dtype, device=device, trainable=trainable)
        self.options: SideOptions = options_of(spec, SideOptions)
        self.prefix = part_prefix(spec)
        for name, width in FIXED.items():
            self.fixed[f"{self.prefix}{name}"] = torch.zeros(size, width, dtype=dtype, device=device)
        #: (B, P) bool, where gradients are dropped; and the edits of which that is not known.
        self._dropped: Tensor | None = None
        self._stale = set(range(size))
        self._distance: Tensor | None = None
        self._seen: tuple[Tensor, Tensor, _Sides] | None = None

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, output: Tensor | None = None) -> Tensor:
        """Change of the output (tokens, d_out) for x (tokens, d_in), tokens sorted by edit: (tokens, d_out)."""
        change = super().delta(site, x, rows)
        if self.trainable and self.row_roles and output is not None and torch.is_grad_enabled():
            self._note(x.detach(), output.detach(), change, rows)
        return change

    def _note(self, x: Tensor, output: Tensor, change: Tensor, rows: Rows | TokenSpans) -> None:
        """Keep how far every row moves now, and what is needed to measure it again."""
        marks = row_marks(rows, self.size, x.device)
        if marks is None:
            return
        assert isinstance(rows, TokenSpans)
        sides: _Sides | None = rows.memory.get("sides")
        if sides is None:
            sides = rows.memory["sides"] = _sides(
                marks, in_scope(self.row_roles, rows, x.device), self.options.tokens, self.size
            )
        counted = sides.tokens
        total = change.index_select(0, counted)
        frozen = output.index_select(0, counted)
        for earlier in self.earlier:
            # All tokens: those of an edit that is fitted on top of others
            total = total + earlier.delta(0, x.index_select(0, counted), Rows(), frozen).to(total.dtype)
        self._distance = _means(moved(frozen, total), sides.row, sides.row_sizes)
        self._seen = (x, output, sides)

    def extra_loss(self) -> Tensor | None:
        """(B,) the margins of the last forward pass, in units; None before any."""
        if self._distance is None or self._seen is None:
            return None
        sides, options = self._seen[2], self.options
        unit = self.fixed[f"{self.prefix}unit"][:, 0].clamp(min=torch.finfo(self.flat.dtype).tiny)
        distance = self._distance / unit.index_select(0, sides.owner)
        near, far = distance.index_select(0, sides.near), distance.index_select(0, sides.far)
        loss = _means((options.beta - near).relu(), sides.owner_of_near, sides.near_sizes)
        loss = loss + _means((far - options.alpha).relu(), sides.owner_of_far, sides.far_sizes)
        self._distance = None
        apart = far.index_select(0, sides.pair_far) - near.index_select(0, sides.pair_near)
        loss = loss + _means((apart + options.gamma).relu(), sides.owner_of_pair, sides.pair_sizes)
        return options.weight * loss

    def end_step(self) -> None:
        """After the backward pass: gradients outside of the mask are dropped."""
        super().end_step()
        if self._stale:
            # Made once an edit, a byte an entry: anew at every step they take longer than the step
            edits = sorted(self._stale)
            keys = self.fixed[f"{self.prefix}mask"][edits]
            if self._dropped is None:
                self._dropped = torch.zeros_like(self.grad, dtype=torch.bool)
            self._dropped[edits] = dropped_entries(keys, self.grad.shape[1], self.options.keep)
            self._stale = set()
        if self._dropped is not None:
            self.grad.masked_fill_(self._dropped, 0.0)

    def set(self, edit: int, values: Mapping[str, Tensor]) -> None:
        """Write parts or fixed tensors of one edit."""
        super().set(edit, values)
        self._stale.add(edit)

    def restart(self, edits: Sequence[int]) -> None:
        """Give these rows the values of a fresh delta, which changes nothing."""
        super().restart(edits)
        self._stale.update(edits)

    def copy_from(self, deltas: Sequence[EditDelta]) -> None:
        """Fill row b from ``deltas[b]``."""
        super().copy_from(deltas)
        self._stale.update(range(len(deltas)))

    def unstack(self, index: int, *, model_fingerprint: str = "", request_id: str = "") -> EditDelta:
        """Edit number ``index`` as a value of its own; one that was fitted has its threshold measured before."""
        if self._seen is not None:
            self._measure(index)
        return super().unstack(index, model_fingerprint=model_fingerprint, request_id=request_id)

    @torch.no_grad()
    def _measure(self, index: int) -> None:
        assert self._seen is not None
        x, output, sides = self._seen
        wanted = (sides.owner == index) & sides.inside
        chosen = wanted[sides.row]
        tokens, row = sides.tokens[chosen], sides.row[chosen]
        if not len(tokens):
            return
        distance = self.distances(index, x[tokens], output[tokens], self.earlier)
        means = row_means(distance, row, len(sides.owner))
        self.fixed[f"{self.prefix}threshold"][index] = self.options.share * means[wanted].min()

    def distances(self, edit: int, x: Tensor, output: Tensor, earlier: Sequence[StackedDelta] = ()) -> Tensor:
        """(T,) how far an edit moves tokens whose input x (T, d_in) the frozen map takes to output (T, d_out)."""
        change = x.to(self.flat.dtype) @ self.parts[f"{self.prefix}delta"][edit].T
        for other in earlier:
            change = change + other.delta(0, x, Rows(), output).to(change.dtype)
        return moved(output, change)

    def distances_of_all(self, x: Tensor, output: Tensor) -> Tensor:
        """(T, B) how far each edit moves tokens whose input x (T, d_in) the frozen map takes to output (T, d_out)."""
        matrices = self.parts[f"{self.prefix}delta"]
        x, frozen = x.to(self.flat.dtype), output.to(self.flat.dtype)
        rest, found = functional.silu(frozen)[:, None], []
        room = _TOGETHER.get(x.device.type, _TOGETHER_ELSEWHERE)
        # One product for as many edits as there is room for
        for part in torch.split(matrices, max(1, room // max(1, output.numel()))):
            change = (x @ part.flatten(0, 1).T).view(len(x), len(part), -1)
            found.append(torch.linalg.vector_norm(functional.silu(change.add_(frozen[:, None])).sub_(rest), dim=2))
        return torch.cat(found, 1)

    def distances_of_own(self, x: Tensor, output: Tensor, counts: Sequence[int]) -> Tensor:
        """(T,) how far the edit of each token moves it, the tokens of an edit back to back.

        Args:
            x, output: as for ``distances``. counts: by edit, how many tokens it has.
        """
        change = super().delta(0, x, TokenSpans([0, *itertools.accumulate(counts)]))
        return moved(output, change)


@dataclass(frozen=True)
class _Sides:
    """What must move and what must not, of R rows of B edits: worked out once per batch.

    Args:
        inside: (R,) bool, rows of an edit's scope. owner: (R,) int64, the edit of each row.
        tokens: (n,) int64, tokens that count. row: (n,) their rows. row_sizes: (R,) tokens that count, at least 1.
        near, far: numbers of rows inside and outside. owner_of_near, owner_of_far: their edits. near_sizes, far_sizes:
            (B,) rows of an edit, at least 1.
        pair_near, pair_far: numbers among ``near`` and ``far`` of every row of an edit against every other row of it.
            owner_of_pair, pair_sizes: alike.
    """

    inside: Tensor
    owner: Tensor
    tokens: Tensor
    row: Tensor
    row_sizes: Tensor
    near: Tensor
    far: Tensor
    owner_of_near: Tensor
    owner_of_far: Tensor
    near_sizes: Tensor
    far_sizes: Tensor
    pair_near: Tensor
    pair_far: Tensor
    owner_of_pair: Tensor
    pair_sizes: Tensor


def _sides(marks: RowMarks, inside: Tensor, tokens: str, size: int) -> _Sides:
    counted = marks.counted(tokens).nonzero()[:, 0]
    row = marks.row[counted]
    near, far = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    owner_of_near, owner_of_far = marks.owner[near], marks.owner[far]
    pair_near, pair_far = (owner_of_near[:, None] == owner_of_far[None]).nonzero(as_tuple=True)
    owner_of_pair = owner_of_near[pair_near]
    sizes = [_sizes(owner, size) for owner in (owner_of_near, owner_of_far, owner_of_pair)]
    return _Sides(
        inside, marks.owner, counted, row, _sizes(row, len(marks.owner)), near, far, owner_of_near, owner_of_far,
        sizes[0], sizes[1], pair_near, pair_far, owner_of_pair, sizes[2],
    )  # fmt: skip


#: Numbers of a change that are held at a time, by type of device: on a CPU as many as stay in its cache.
_TOGETHER = {"cpu": 1 << 17}
_TOGETHER_ELSEWHERE = 1 << 24
#: Widths of the fixed tensors by name.
FIXED = {"mask": 4, "unit": 1, "threshold": 1, "edits": 1, "merged": 1}


def part_prefix(spec: DeltaSpec) -> str:
    """What the names of the parts begin with."""
    return f"{spec.sites[0].layer}.{spec.sites[0].name}:"


def moved(output: Tensor, change: Tensor) -> Tensor:
    """(T,) distance between the activations of outputs (T, d) with and without a change (T, d)."""
    frozen = output.to(change.dtype)
    distance: Tensor = torch.linalg.vector_norm(functional.silu(frozen + change) - functional.silu(frozen), dim=1)
    return distance


def row_means(values: Tensor, number: Tensor, count: int) -> Tensor:
    """(count,) means of the values (T,) that have each number (T,), 0 where there are none."""
    return _means(values, number, _sizes(number, count))


def _means(values: Tensor, number: Tensor, sizes: Tensor) -> Tensor:
    """The same where it is known how many have each number."""
    return values.new_zeros(len(sizes)).index_add(0, number, values) / sizes


def _sizes(number: Tensor, count: int) -> Tensor:
    """(count,) how many have each number (T,), at least 1."""
    return torch.bincount(number, minlength=count).clamp(min=1)


def accumulate_side(deltas: Sequence[EditDelta]) -> EditDelta:
    """One memory that holds the edits of several: the sum of their changes, the smallest of their thresholds."""
    fixed = _joined(deltas, merged=0.0)
    summed = accumulate_full(deltas)
    return replace(summed, tensors={**summed.tensors, **fixed})


def merged_side(deltas: Sequence[EditDelta], density: float) -> EditDelta:
    """One memory by TIES (arXiv 2306.01708): what is small is dropped, signs are elected, agreeing values averaged."""
    name = f"{part_prefix(deltas[0].spec)}delta"
    tensors = {name: ties([delta.tensors[name] for delta in deltas], density), **_joined(deltas, merged=1.0)}
    texts = joined_questions([delta.texts for delta in deltas])
    request_id = "+".join(delta.request_id for delta in deltas)
    # Not the sum of its edits: what is fitted on top of it was fitted on nothing else
    return replace(deltas[0], tensors=tensors, texts=texts, request_id=request_id, fitted_on=None, merged=())


def empty_side(like: EditDelta) -> EditDelta:
    """A memory without edits, which acts nowhere."""
    prefix = part_prefix(like.spec)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in like.tensors.items()}
    tensors[f"{prefix}threshold"] = torch.full((1,), torch.inf)
    return replace(like, tensors=tensors, texts={}, request_id="", fitted_on=(), merged=())


def _joined(deltas: Sequence[EditDelta], *, merged: float) -> Mapping[str, Tensor]:
    """Fixed tensors of several memories together."""
    prefix = part_prefix(deltas[0].spec)

    def column(name: str) -> Tensor:
        return torch.cat([delta.tensors[f"{prefix}{name}"] for delta in deltas])

    return {
        f"{prefix}mask": deltas[-1].tensors[f"{prefix}mask"],
        f"{prefix}unit": column("unit").max()[None],
        f"{prefix}threshold": column("threshold").min()[None],
        f"{prefix}edits": column("edits").sum()[None],
        f"{prefix}merged": torch.full((1,), merged),
    }


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """TIES-merging of changes of equal shape (arXiv 2306.01708, algorithm 1).

    Args:
        changes: at least one. density: share of the entries of each that stay, the largest ones.
    Returns:
        The mean, over the changes whose entry stayed and has the elected sign, of that entry; the sign is that of the
        sum of what stayed ("mass").
    Raises:
        ValueError: no changes, or a density outside of (0, 1].
    """
    if not changes or not 0 < density <= 1:
        raise ValueError(f"ties: some changes, density in 0 to 1 (got changes={len(changes)}, density={density!r})")
    kept = [_trimmed(change, density) for change in changes]
    sign = torch.stack(kept).sum(0).sign()
    agreeing = [change * (change.sign() == sign) for change in kept]
    count = torch.stack([change != 0 for change in agreeing]).sum(0)
    return torch.stack(agreeing).sum(0) / count.clamp(min=1)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """The change with its smallest entries at zero."""
    dropped = change.numel() - round(density * change.numel())
    if dropped == 0:
        return change
    limit = change.abs().flatten().kthvalue(dropped).values
    return change * (change.abs() > limit)
