"""An entry of a codebook beside a feed-forward block: a key that says where it acts, a value that stands there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastedit.deltas.base import DeltaSpec, EditDelta, FlatStack
from fastedit.deltas.options import CodebookOptions, options_of
from fastedit.deltas.questions import questions_of
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.deltas.scope import in_scope, row_marks

#: Types whose products are as exact as their differences.
_EXACT = (torch.float32, torch.float64)
#: Distances that are held at once: 64 MiB.
_AT_ONCE = 1 << 24


class CodebookDelta(FlatStack):
    """The block's output is the entry's value: ``y = value``, or ``y += value``.

    GRACE, arXiv 2211.11031, equation (1): a layer's output is replaced by the value of the nearest key where that is no
    further than the key's deferral radius. Where it acts is the router's business (``"ball"``). An entry has n values,
    the first for the last token of the prompt, the others for the tokens behind it one by one; behind as many as the
    target has the block is as it was. The paper has one, which alone cannot tell the tokens of an answer apart. While
    it is fitted there is no router: rows of the edit and of its rephrases have the values, and others where the router
    would let them.

    Options of the spec: ``replace`` (bool), whether a value replaces the output or is added to it; ``values``, n.
    Parts, after ``"{layer}.{name}:"``: ``value`` (B, n, d).
    Fixed, likewise: ``key`` (B, d), in the space of what the block reads; ``radius`` (B, 1); ``length`` (B, 1),
    tokens of the target, of which n count; ``label`` (B, 4), equal for equal targets.

    Raises:
        ValueError: not exactly one site, or not the end of a feed-forward block.
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        if len(spec.sites) != 1 or spec.sites[0].name != "down":
            got = [f"{site.layer}.{site.name}" for site in spec.sites]
            raise ValueError(f"codebook: an entry stands beside one 'down' (got sites={got})")
        (site,) = spec.sites
        self.prefix = f"{site.layer}.{site.name}:"
        # A feed-forward block ends as wide as it begins
        fixed = {f"{self.prefix}key": (site.d_out,)}
        fixed |= {f"{self.prefix}radius": (1,), f"{self.prefix}length": (1,), f"{self.prefix}label": (4,)}
        options: CodebookOptions = options_of(spec, CodebookOptions)
        self.n_values = options.values
        shapes = {f"{self.prefix}value": (self.n_values, site.d_out)}
        super().__init__(spec, shapes, size, dtype=dtype, device=device, trainable=trainable, fixed=fixed)
        self.replaces = options.replace

    def reader(self, site: int) -> str | None:
        """Keys lie where the block reads."""
        return "up"

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, output: Tensor) -> Tensor:
        """Change of the block's output (tokens, d) for its input x (tokens, d), tokens sorted by edit: (tokens, d)."""
        steps = rows.steps(x.device) if isinstance(rows, TokenSpans) else None
        if steps is None:
            raise ValueError(
                "codebook: an entry acts where the model knows which tokens are an answer's (got padded rows)"
            )
        value = self.differentiable(f"{self.prefix}value")
        sizes = rows.offsets_tensor(x.shape[0], self.size, x.device).diff()
        owner = torch.repeat_interleave(torch.arange(self.size, device=x.device), sizes, output_size=x.shape[0])
        change = value[owner, steps.clamp(0, self.n_values - 1)]
        if self.replaces:
            change = change - output.to(change.dtype)
        length = self.fixed[f"{self.prefix}length"][:, 0].clamp(max=self.n_values)
        acting = (steps >= 0) & (steps < length[owner])
        held = self._held(x, rows)
        return change * (acting if held is None else acting & held)[:, None]

    def _held(self, x: Tensor, rows: Rows | TokenSpans) -> Tensor | None:
        """(tokens,) bool, those of rows that have the value while it is fitted; None is all."""
        marks = row_marks(rows, self.size, x.device) if self.row_roles else None
        if marks is None:
            return None
        # Keys and radii of edits that enter are written after the rows are known: not to be kept
        key, radius = self.fixed[f"{self.prefix}key"], self.fixed[f"{self.prefix}radius"][:, 0]
        distance = torch.linalg.vector_norm(x[marks.last].to(key.dtype) - key[marks.owner], dim=1)
        held: Tensor = in_scope(self.row_roles, rows, x.device) | (distance <= radius[marks.owner])
        return held[marks.row]


class Entries(list[EditDelta]):
    """Entries of a codebook in sequence; with their keys as one matrix, so that one more costs one pass over it."""

    def __init__(self, entries: Sequence[EditDelta] = ()) -> None:
        super().__init__()
        self._keys = torch.empty(0)
        #: Which entries answer a question.
        self._asked: dict[str, list[int]] = {}
        #: Entries that come next, the number of their first; of those from ``_begun`` on, squared distances.
        self._coming: Sequence[EditDelta] = ()
        self._first = self._begun = 0
        self._rough, self._longest = torch.empty(0), torch.zeros(())
        for entry in entries:
            self.append(entry)

    def append(self, entry: EditDelta) -> None:
        """One more entry, as it is."""
        key = entry.tensors[f"{_prefix(entry)}key"]
        if len(self) >= len(self._keys):
            grown = key.new_zeros(max(64, 2 * len(self._keys)), len(key))
            if self:
                grown[: len(self)] = self._keys[: len(self)]
            self._keys = grown
        self._keys[len(self)] = key
        for question in questions_of(entry.texts):
            self._asked.setdefault(question, []).append(len(self))
        super().append(entry)
        if len(self) == self._first + len(self._coming):
            self._coming, self._rough = (), torch.empty(0)

    def expect(self, coming: Sequence[EditDelta]) -> None:
        """Say which entries come next, in order: what is nearest to them is looked for many at a time."""
        self._coming, self._first = coming, len(self)
        self._rough = torch.empty(0)

    def nearest(self, new: EditDelta) -> tuple[int, Tensor] | None:
        """The entry of another question whose key is nearest, and its distance; None where there is none."""
        own = {number for question in questions_of(new.texts) for number in self._asked.get(question, ())}
        if len(own) == len(self):
            return None
        key, keys = new.tensors[f"{_prefix(new)}key"], self._keys[: len(self)]
        near = self._near(new, list(own))
        if near is not None:
            # The same numbers as below, for the few that can be the nearest
            distances = torch.linalg.vector_norm(keys[near] - key, dim=1)
            least = int(distances.argmin())
            return int(near[least]), distances[least]
        distances = torch.linalg.vector_norm(keys - key, dim=1)
        distances[list(own)] = torch.inf
        number = int(distances.argmin())
        return number, distances[number]

    def _near(self, new: EditDelta, own: list[int]) -> Tensor | None:
        """Numbers of the entries that can be nearest to an expected one; None where it was not."""
        at = len(self) - self._first
        if not (0 <= at < len(self._coming) and self._coming[at] is new) or self._keys.dtype not in _EXACT:
            return None
        if not self._begun <= at < self._begun + len(self._rough):
            self._look(at)
        rough = self._rough[at - self._begun, : len(self)].clone()
        rough[own] = torch.inf
        # Of squared distances by products, and of those by differences, the rounding is no more than this each
        key = new.tensors[f"{_prefix(new)}key"]
        longest = self._longest + torch.linalg.vector_norm(key)
        error = (len(key) + 8) * torch.finfo(key.dtype).eps * longest.square()
        possible = rough <= rough.amin() + 4 * error
        possible[own] = False
        found = possible.nonzero()[:, 0]
        return found if len(found) else None

    def _look(self, at: int) -> None:
        """Squared distances of some expected entries from those that are there, and from one another."""
        known = len(self)
        count = max(1, min(len(self._coming) - at, _AT_ONCE // (known + 1)))
        count = min(count, max(1, int(_AT_ONCE**0.5)))
        some = self._coming[at : at + count]
        new = torch.stack([entry.tensors[f"{_prefix(entry)}key"] for entry in some])
        keys = torch.cat([self._keys[:known], new])
        squares = keys.square().sum(1)
        self._rough = torch.addmm(squares, new, keys.T, alpha=-2).add_(squares[known:, None])
        self._begun, self._longest = at, squares.amax().sqrt()


def _prefix(entry: EditDelta) -> str:
    (site,) = entry.spec.sites
    return f"{site.layer}.{site.name}:"


def with_entry(entries: Sequence[EditDelta], new: EditDelta) -> Entries:
    """A codebook with one more entry: where its ball meets the nearest one's and their targets differ, both shrink.

    GRACE, arXiv 2211.11031, algorithm 1. There a new edit of the same target gets no entry, but widens the nearest
    ball; here it keeps its own, which covers the same and nothing that neither held. Of several balls that hold an
    input the nearest key's acts. An earlier entry of the same question is left as it is: in its ball the new one acts.

    Args:
        entries: in the order in which they were made; ``Entries`` grow in place, others are copied.
    """
    combined = entries if isinstance(entries, Entries) else Entries(entries)
    found = combined.nearest(new)
    if found is not None:
        number, between = found
        other = combined[number]
        radius, label = (f"{_prefix(new)}{name}" for name in ("radius", "label"))
        apart = bool(between > other.tensors[radius] + new.tensors[radius])
        # Equal keys have no middle between them: of equally near ones the latest acts
        if not apart and between and not torch.equal(other.tensors[label], new.tensors[label]):
            combined[number] = _within(other, radius, between / 2)
            new = _within(new, radius, between / 2)
    combined.append(new)
    return combined


def expecting(entries: Sequence[EditDelta], coming: Sequence[EditDelta]) -> Entries:
    """A codebook, ready for ``with_entry`` with these entries one after another."""
    combined = entries if isinstance(entries, Entries) else Entries(entries)
    combined.expect(coming)
    return combined


def _within(entry: EditDelta, radius: str, most: Tensor) -> EditDelta:
    return replace(entry, tensors={**entry.tensors, radius: entry.tensors[radius].clamp(max=float(most))})
