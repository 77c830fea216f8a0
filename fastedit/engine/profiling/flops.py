"""Necessary floating-point operations: what editing cannot do without, from the shapes of the model's own modules.

The figure of merit of the engine is necessary-FLOP utilisation (NFU): these operations over time, over the measured
matrix-multiply peak of the same machine and dtype. Counted are matrix products only (2 m n k for (m, k) x (k, n));
norms, activations, the loss and the optimiser are not: they are overhead here, as is everything done twice.

* Vision: the tower once per distinct image.
* Prefix: once per row, every linear map whose input and weight cannot change while the delta is fitted. That includes
  maps inside the first edited layer (the gate of an edited feed-forward block, say).
* Tail, at every evaluation of the loss: maps that the delta reaches. A full weight change counts as its map does, once:
  weight and delta can be one matrix. A low-rank change adds 2 n r (d_in + d_out) for n positions, an entry of a
  codebook nothing.
* Backward, at every step: the gradient by a map's input where that input depends on the delta, by its weight where the
  weight is fitted.
* Positions: label positions in the head, and in the last layer's queries, output map and feed-forward block; every
  position up to the last label elsewhere, because later attention reads it. Attention counts the (query, key) pairs
  that the causal mask, or the window, lets through.
* A delta that acts behind the image alone, or from the end of the prompt on: positions before never depend on it. All
  of their products are prefix, and no gradient goes to them.
* Rows of an edit that begin alike: what they share once. Their last tokens attend to it, each for itself.
* Views without loss, which a delta compares the prompts of: their prefix, up to the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastedit.backbone import EditableModel, Encoded, Site
from fastedit.backbone.cpu_linear import torch_products
from fastedit.backbone.generic.adapter import generic
from fastedit.deltas import DeltaSpec
from fastedit.fitting.solver import FitOutcome

#: A layer's maps: attention inputs, attention output, feed-forward inputs, feed-forward output.
_KEYS_VALUES = ("k", "v")
_FEED_IN = ("up", "gate")


#: Kinds of deltas whose work is counted.
COUNTED = frozenset({"full", "low_rank", "side", "codebook"})


def is_counted(spec: DeltaSpec, model: EditableModel | None = None) -> bool:
    """Whether the work of a delta is counted: of a known kind, in decoder layers of a family's model."""
    known = model is None or generic(model.adapter) is None
    return known and spec.kind in COUNTED and all(site.layer >= 0 for site in spec.sites)


@dataclass(frozen=True, slots=True)
class RowFlops:
    """One teacher-forced row.

    Args:
        prefix: once. forward: every evaluation of the loss. backward: every step. head: part of ``forward``.
    """

    prefix: int
    forward: int
    backward: int
    head: int


@dataclass(frozen=True, slots=True)
class NecessaryFlops:
    """A batch of edits: operations by what they are for."""

    vision: int
    prefix: int
    reference: int
    forward: int
    backward: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision + self.prefix + self.reference + self.forward + self.backward

    def __add__(self, other: NecessaryFlops) -> NecessaryFlops:
        return NecessaryFlops(
            self.vision + other.vision,
            self.prefix + other.prefix,
            self.reference + other.reference,
            self.forward + other.forward,
            self.backward + other.backward,
        )


@dataclass(slots=True)
class _Tally:
    """Where a product goes: constant inputs count once, others at every evaluation, gradients at every step.

    Args:
        first: positions before this one are constant. begin: positions before this one are another row's.
    """

    first: int = 0
    begin: int = 0
    prefix: int = 0
    forward: int = 0
    backward: int = 0

    def product(self, flops: int, *, live: bool) -> None:
        if live:
            self.forward += flops
        else:
            self.prefix += flops


class FlopCounter:
    """Counts the necessary operations of edits on one model with one kind of delta.

    Args:
        model: its shapes are read, nothing of it is changed.
        spec: kind and sites of the delta.
        causal: count only the (query, key) pairs that the mask lets through; False counts all, as dense attention
            kernels and ``torch.utils.flop_counter`` do.
    Raises:
        ValueError: a kind of delta whose operations are not known here.
    """

    def __init__(self, model: EditableModel, spec: DeltaSpec, *, causal: bool = True) -> None:
        if not is_counted(spec):
            got = f"kind={spec.kind!r}, layers={sorted({site.layer for site in spec.sites})}"
            raise ValueError(f"flops: kind is one of {sorted(COUNTED)}, in decoder layers (got {got})")
        self.model, self.spec, self.causal = model, spec, causal
        self._edited = {(site.layer, site.name) for site in spec.sites}
        names = list(model.adapter.text.site_paths)
        self._sites: list[dict[str, Site]] = [
            {site.name: site for site in model.sites([layer], names)} for layer in range(model.n_layers)
        ]
        self._vision: dict[tuple[Any, ...], int] = {}
        self._rows: dict[tuple[int, tuple[int, ...], int, int], RowFlops] = {}

    def row(self, tokens: int, labels: Sequence[int], first: int = 0, begin: int = 0) -> RowFlops:
        """Operations of one row.

        Args:
            tokens: length, padding not counted.
            labels: positions that carry loss, rising, below ``tokens``.
            first: the first position at which the delta acts; those before it are constant.
            begin: the first position that is the row's own; another row has those before it.
        Raises:
            ValueError: no label, or one outside the row.
        """
        key = (tokens, tuple(labels), first, begin)
        if not labels or min(labels) < 0 or max(labels) >= tokens:
            raise ValueError(f"flops: labels lie in 0 to tokens - 1 (got tokens={tokens}, labels={list(labels)!r})")
        if key not in self._rows:
            self._rows[key] = self._row(max(labels) + 1, key[1], first, begin)
        return self._rows[key]

    def _row(self, seen: int, labels: tuple[int, ...], first: int, begin: int) -> RowFlops:
        tally = _Tally(first, begin)
        dirty = False
        for layer in range(self.model.n_layers):
            dirty = self._layer(tally, layer, seen, labels, dirty)
        head = 2 * len(labels) * self.model.hidden_size * self.model.vocab_size
        tally.forward += head
        tally.backward += head
        return RowFlops(tally.prefix, tally.forward, tally.backward, head)

    def _layer(self, tally: _Tally, layer: int, seen: int, labels: tuple[int, ...], dirty: bool) -> bool:
        """Add one layer; return whether the residual stream after it depends on the delta."""
        last = layer == self.model.n_layers - 1
        # Positions of queries and of everything after them, as positions themselves.
        everywhere = tuple(range(tally.begin, seen))
        queries = labels if last else everywhere
        live = {name: self._map(tally, layer, name, everywhere, dirty) for name in _KEYS_VALUES}
        live["q"] = self._map(tally, layer, "q", queries, dirty)
        scores = live["q"] or live["k"]
        self._attention(tally, layer, queries, seen, live)
        mixed = self._map(tally, layer, "o", queries, scores or live["v"])
        dirty = dirty or mixed
        inner = [self._map(tally, layer, name, queries, dirty) for name in _FEED_IN if name in self._sites[layer]]
        return self._map(tally, layer, "down", queries, any(inner)) or dirty

    def _map(self, tally: _Tally, layer: int, name: str, at: tuple[int, ...], dirty: bool) -> bool:
        """Add one linear map at some positions; return whether its output depends on the delta."""
        site = self._sites[layer][name]
        n = sum(position >= tally.first for position in at)
        tally.product(2 * (len(at) - n) * site.d_in * site.d_out, live=False)
        product = 2 * n * site.d_in * site.d_out
        edited = (layer, name) in self._edited
        if edited and self.spec.kind == "low_rank":
            rank = int(self.spec.options["rank"])
            inward, outward = 2 * n * rank * site.d_in, 2 * n * rank * site.d_out
            tally.product(product, live=dirty)
            tally.forward += inward + outward
            # By ``up``, by the inner code, by ``down``; and by the input where that depends on the delta
            tally.backward += 2 * outward + inward + (product + inward if dirty else 0)
            return True
        weighed = edited and self.spec.kind != "codebook"
        tally.product(product, live=dirty or weighed)
        tally.backward += product * (int(dirty) + int(weighed))
        return dirty or edited

    def _attention(
        self, tally: _Tally, layer: int, queries: tuple[int, ...], seen: int, live: Mapping[str, bool]
    ) -> None:
        """Add query-key and weight-value products; a head's widths add up to the query map's output."""
        width = self._sites[layer]["q"].d_out
        behind = tuple(position for position in queries if position >= tally.first)
        constant = tuple(position for position in queries if position < tally.first)
        tally.product(4 * self._pairs(layer, constant, seen) * width, live=False)
        product = 2 * self._pairs(layer, behind, seen) * width
        # Pairs whose key may depend on the delta
        reached = 2 * self._pairs(layer, behind, seen, tally.first) * width
        scores = live["q"] or live["k"]
        tally.product(product, live=scores)
        tally.product(product, live=scores or live["v"])
        # Of the weights when they depend on the delta, then of queries and keys; of the values
        tally.backward += product * (int(scores) + int(live["q"])) + reached * (int(live["k"]) + int(live["v"]))

    def _pairs(self, layer: int, queries: tuple[int, ...], seen: int, first: int = 0) -> int:
        """Pairs of these queries and the keys from ``first`` on."""
        if not self.causal:
            return len(queries) * (seen - first)
        text = self.model.adapter.text
        window = seen
        if text.kinds[layer] == "sliding_attention":
            window = int(text.config.sliding_window)
        return sum(max(0, min(position + 1 - first, window)) for position in queries)

    def vision(self, encoded: Encoded) -> int:
        """Operations of the vision side on every distinct image of the rows.

        Counted by running the model's own vision side once per shape of image under ``torch.utils.flop_counter``, so
        every tower and projector is counted from its modules, attention by its dense products. The counter knows
        torch's own products, not oneDNN's.
        """
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        total = 0
        for image in encoded.distinct_images.values():
            shape = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(image.tensors.items()))
            # Grids are values, not shapes: two images may have as many patches and other windows.
            shape += tuple((name, tuple(t.flatten().tolist())) for name, t in image.tensors.items() if t.numel() <= 8)
            if shape not in self._vision:
                # The plain backend decomposes into products that the counter knows on every device.
                counted = FlopCounterMode(display=False)
                with torch.no_grad(), torch_products(self.model.hf), sdpa_kernel(SDPBackend.MATH), counted:
                    self.model.adapter.image_features([image])
                self._vision[shape] = int(counted.get_total_flops())
            total += self._vision[shape]
        return total

    def batch(
        self,
        encoded: Encoded,
        edit_of_row: Sequence[int],
        outcomes: Sequence[FitOutcome],
        reference_rows: Sequence[int] = (),
        beside_rows: Sequence[int] = (),
        begins: Mapping[int, int] = MappingProxyType({}),
    ) -> NecessaryFlops:
        """Operations of a batch of edits that ended as they did.

        Args:
            encoded: R training rows.
            edit_of_row: (R,) the edit that a row belongs to.
            outcomes: of the edits. A fit that stopped early evaluated its loss once more than it stepped.
            reference_rows: rows whose unedited logits are needed once (locality views).
            beside_rows: rows without loss, whose prompts are compared.
            begins: by row, tokens that it begins with as an earlier row does.
        """
        lengths = encoded.lengths.tolist()
        rows = []
        for number, positions in enumerate(encoded.label_positions().tolist()):
            labels = [int(p) for p in positions if p >= 0]
            if number in beside_rows:
                prefix = self.row(labels[0] + 1, labels[:1], self._acts_from(encoded, number)).prefix
                rows.append(RowFlops(prefix, 0, 0, 0))
                continue
            rows.append(self.row(int(lengths[number]), labels, self._acts_from(encoded, number), begins.get(number, 0)))
        evaluations = [outcome.steps + int(outcome.status not in ("max_steps", "diverging")) for outcome in outcomes]
        return NecessaryFlops(
            vision=self.vision(encoded),
            prefix=sum(row.prefix for row in rows),
            reference=sum(rows[number].forward for number in reference_rows),
            forward=sum(row.forward * evaluations[edit] for row, edit in zip(rows, edit_of_row, strict=True)),
            backward=sum(row.backward * outcomes[edit].steps for row, edit in zip(rows, edit_of_row, strict=True)),
        )

    def _acts_from(self, encoded: Encoded, row: int) -> int:
        """The first position of a row at which the delta acts."""
        if self.spec.options.get("positions") == "answer":
            return int(encoded.label_mask[row].nonzero()[0])
        if self.spec.options.get("positions") != "after_image":
            return 0
        image = encoded.image_mask[row].nonzero()
        return int(image.max()) + 1 if len(image) else 0


@dataclass(frozen=True, slots=True)
class Peak:
    """What a machine reaches on one dtype, measured.

    Args:
        matmul_gflop_per_s: of a large square matrix product.
        copy_gib_per_s: bytes read plus bytes written by a large copy.
        dtype: of the operands.
    """

    matmul_gflop_per_s: float
    copy_gib_per_s: float
    dtype: str = field(default="float32")


def nfu(flops: int, seconds: float, peak: Peak) -> float:
    """Necessary-FLOP utilisation, 0 to 1: flops over what the machine's matrix-multiply peak does in that time.

    Raises:
        ValueError: time or peak is not positive.
    """
    if not (seconds > 0 and peak.matmul_gflop_per_s > 0):
        got = f"seconds={seconds!r}, matmul_gflop_per_s={peak.matmul_gflop_per_s!r}"
        raise ValueError(f"nfu: seconds and peak are positive (got {got})")
    return flops / (seconds * peak.matmul_gflop_per_s * 1e9)
