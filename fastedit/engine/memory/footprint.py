"""Bytes that a batch of edits takes, from the shapes of the model's own modules and of its rows.

Factors stand for how many values of a width are alive per token at the worst moment of a use; they were set by
measuring peaks, see ``tests/engine/memory/test_plan.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastedit.backbone import EditableModel, Site
from fastedit.backbone.model import VISION_BATCH, VISION_BATCH_CPU
from fastedit.deltas import DeltaSpec
from fastedit.deltas.kinds import new_stack
from fastedit.engine.asking import LOGITS, MEMORY
from fastedit.engine.leaving import MOST_BYTES
from fastedit.engine.memory.workload import RowKind, Workload
from fastedit.fitting.prepared import split_point

# Widths alive per token while a layer runs without gradient: of the residual stream, of queries (keys and values
# repeated for their heads), of the feed-forward block
_RUN_HIDDEN, _RUN_QUERY, _RUN_FEED = 5, 5, 3
# Widths kept per token for the backward pass: of attention over all tokens, of the last layer's, which asks at labels
# only, and of a feed-forward block
_KEPT_QUERY, _KEPT_HIDDEN, _KEPT_LAST, _KEPT_FED, _KEPT_FEED = 10, 6, 6, 4, 6
# and alive besides while one layer is gone through backwards
_BACK_HIDDEN, _BACK_FEED = 2, 3
# What allocators waste between blocks of different sizes
_WASTE = 1.15
# Planes (labels, vocabulary) of a step: logits, their gradient, and with locality views selected ones and references
_PLANES, _PLANES_LOCALITY = 2.5, 4.5
# of an evaluation: before, after, and what is ranked of them
_PLANES_SCORED = 3.0
# Copies of a batch's prefix states: as encoded, and as they are fed to the tail
_STATES = 2
# Rows of parameters per edit while fitting: values, gradient, two moments; the finished delta is a fifth
_DELTA_ROWS = 4
# Parts that are there over several phases
_LASTING = ("prefix states", "delta rows", "gradient masks", "expanded tail")
# Rows of one forward and tokens of one answer, the defaults of ``Evaluator``
EVALUATED_ROWS, NEW_TOKENS = 256, 48
# Freed blocks are kept up to so many bytes on a CPU (``ops.keep_freed_memory``)
_KEPT_BLOCKS = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder and of its vision side.

    Args:
        hidden, query, key, feed, vocabulary: d, query and key widths, feed-forward width, V.
        layers: L. first: lowest edited layer, entered at ``stage``.
        vision_hidden, vision_feed, vision_kept: of the tower; how many layers' outputs are kept until its end.
        element: bytes of a value.
    """

    hidden: int
    query: int
    key: int
    feed: int
    vocabulary: int
    layers: int
    first: int
    stage: str
    vision_hidden: int
    vision_feed: int
    vision_kept: int
    element: int

    @classmethod
    def of(cls, model: EditableModel, spec: DeltaSpec) -> Sizes:
        """Read off a model, with or without weights."""
        sites = {site.name: site for site in model.sites([0], list(model.adapter.text.paths_of(0)))}
        first, stage = split_point(spec)
        vision: Any = getattr(model.hf.config, "vision_config", None)
        width = _number(vision, "embed_dim", "hidden_size")
        feed = getattr(vision, "intermediate_size", None) or int(width * getattr(vision, "mlp_ratio", 4))
        depth = _number(vision, "depth", "num_hidden_layers")
        # A tower whose features come from one of its middle layers returns the outputs of all
        keeps = getattr(model.hf.config, "vision_feature_layer", None) is not None
        return cls(
            hidden=model.hidden_size,
            query=_width(sites, ("q", "q_b", "qkv", "o"), model.hidden_size),
            key=model.stored_per_token // (2 * model.n_layers),
            feed=_width(sites, ("up", "gate_up"), 4 * model.hidden_size),
            vocabulary=model.vocab_size,
            layers=model.n_layers,
            first=first,
            stage=stage,
            vision_hidden=width,
            vision_feed=int(feed),
            vision_kept=depth if keeps else 0,
            element=model.dtype.itemsize,
        )

    def running(self, tokens: float) -> float:
        """Bytes of a layer that runs on so many tokens without gradient."""
        per_token = _RUN_HIDDEN * self.hidden
        return _WASTE * self.element * tokens * (per_token + max(_RUN_QUERY * self.query, _RUN_FEED * self.feed))

    def kept(self, tokens: float, labels: float) -> float:
        """Bytes of a tail with gradient over so many tokens and labels."""
        last = self.layers - 1
        attention = _KEPT_QUERY * self.query + _KEPT_HIDDEN * self.hidden
        feed = _KEPT_FED * self.hidden + _KEPT_FEED * self.feed
        back = _BACK_HIDDEN * self.hidden + _BACK_FEED * self.feed
        # every layer's feed-forward block, the last one's at labels
        blocks = (last - self.first) * tokens * feed + labels * feed
        # attention of every layer but the first where that is entered behind it
        whole = last - self.first - (self.stage == "ffn")
        if whole >= 0:
            blocks += tokens * (whole * attention + _KEPT_LAST * self.hidden)
        return _WASTE * self.element * (blocks + (tokens if self.first < last else labels) * back)

    def states(self, tokens: float, labels: float) -> float:
        """Bytes of what enters the tail."""
        if self.stage == "ffn" and self.first == self.layers - 1:
            return self.element * labels * self.hidden
        held = self.feed if self.stage == "ffn" else self.query
        return self.element * tokens * (self.hidden + 2 * held)

    def vision(self, images: float, patches: int, *, on_cpu: bool) -> float:
        """Bytes of the tower at work on so many images."""
        most = VISION_BATCH_CPU if on_cpu else VISION_BATCH
        widths = (self.vision_kept + 8) * self.vision_hidden + 2 * self.vision_feed
        return self.element * min(images, most) * patches * widths


def _number(config: Any, *names: str) -> int:
    """The first of these entries that a configuration has; 0 where it has none."""
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)


def _width(sites: Mapping[str, Site], names: Sequence[str], default: int) -> int:
    """What the first of these maps that a layer has puts out."""
    return next((sites[name].d_out for name in names if name in sites), default)


def delta_parameters(spec: DeltaSpec) -> int:
    """Scalars of one edit's delta."""
    shapes = new_stack(spec, 0, trainable=False).shapes
    return sum(math.prod(shape) for shape in shapes.values())


def mask_bytes(spec: DeltaSpec) -> int:
    """Bytes of one edit's mask, where gradients have one."""
    return delta_parameters(spec) if spec.kind == "side" else 0


def expanded_bytes(model: EditableModel, first: int) -> int:
    """Bytes of the 4-bit maps that are written out from a layer on (``backbone.expanded_layers``)."""
    if model.quantize != "nf4":
        return 0
    sites = model.sites(range(first, model.n_layers), list(model.adapter.text.site_paths))
    return sum(site.d_in * site.d_out for site in sites) * model.dtype.itemsize


def held_parts(
    model: EditableModel, sizes: Sizes, work: Workload, *, budget: int, parameters: int, locality: int, on_cpu: bool
) -> dict[str, int]:
    """Bytes that stay over the batches of a run: images, and what is remembered of edits.

    Args:
        budget: bytes of the caches of pixels and of features, each. parameters: of a delta that stays in memory.
        locality: rows of an edit whose states and reference logits are kept for later edits.
    """
    training = work.training
    features = work.image_tokens * sizes.hidden * sizes.element
    states, references = (0, 0)
    if locality:
        states, references = model.caches.states.budget_bytes, model.caches.references.budget_bytes
    if work.edits is None:
        # of unknown length: the caches fill up
        images = budget * (2 if on_cpu else 1)
        return {"image caches": images, "fitted deltas": 0, "state caches": states + references}
    count = work.edits * work.images_per_edit
    rows = work.edits * locality
    planes = rows * training.labels * sizes.vocabulary * sizes.element
    states = min(states, int(sizes.states(rows * training.tokens, rows * training.labels)))
    cached = min(budget, count * features) + (min(budget, count * work.image_bytes) if on_cpu else 0)
    return {
        "image caches": int(cached),
        "fitted deltas": work.edits * parameters * 4,
        "state caches": states + min(references, int(planes)),
    }


def phase_parts(
    model: EditableModel,
    sizes: Sizes,
    work: Workload,
    *,
    batch_size: int,
    parameters: int,
    masks: int = 0,
    evaluate: bool,
    locality: int,
    on_cpu: bool,
    penalty: int = 0,
) -> dict[str, dict[str, int]]:
    """Bytes of the phases of a batch, which do not run at once: {phase: {part: bytes}}.

    Args:
        penalty: what an objective takes beside a step's logits.
    """
    kind = work.training
    rows = batch_size * kind.per_edit
    tokens, labels = rows * kind.tokens, rows * kind.labels
    delta_element = 8 if model.dtype == torch.float64 else 4
    delta = batch_size * parameters * delta_element
    states = _STATES * sizes.states(tokens, labels)
    planes = _PLANES_LOCALITY if locality else _PLANES
    logits = planes * labels * sizes.vocabulary * sizes.element
    phases: dict[str, Mapping[str, float]] = {
        "encode": {"vision side": sizes.vision(batch_size * work.images_per_edit, work.patches, on_cpu=on_cpu)},
        "prefix": {"prefix states": states, "prefix layers": sizes.running(tokens)},
        "fit": {
            "prefix states": states,
            "tail activations": sizes.kept(tokens, labels),
            "logits": logits,
            "penalty": penalty,
            "delta rows": _DELTA_ROWS * delta,
            "fitted deltas on the device": 0 if on_cpu else min(MOST_BYTES, delta),
            "gradient masks": batch_size * masks,
            "expanded tail": expanded_bytes(model, sizes.first),
        },
        # every finished delta is copied out of the rows
        "store": {
            "prefix states": states,
            "delta rows": (_DELTA_ROWS + 1) * delta,
            "gradient masks": batch_size * masks,
            "expanded tail": expanded_bytes(model, sizes.first),
        },
    }
    if evaluate:
        # Edits that have ended are scored while the places they left are there: rows, the deltas and their stack
        phases["evaluate"] = {
            "prefix states": states,
            "delta rows": (_DELTA_ROWS + 2) * delta,
            "gradient masks": batch_size * masks,
            **_evaluation(sizes, work.evaluation, batch_size),
        }
    found = {phase: {name: int(part) for name, part in parts.items() if part} for phase, parts in phases.items()}
    if on_cpu:
        # What one phase frees is kept for the next, which wants blocks of other sizes
        working = {phase: sum(p for name, p in parts.items() if name not in _LASTING) for phase, parts in found.items()}
        for phase, parts in found.items():
            others = sum(size for other, size in working.items() if other != phase) // 2
            if phase == "evaluate":
                # Every decoding step wants blocks of other sizes than the one before
                others += working[phase]
            if others:
                parts["kept blocks"] = min(_KEPT_BLOCKS, others)
    return found


def _evaluation(sizes: Sizes, kind: RowKind, batch_size: int) -> dict[str, float]:
    rows = min(EVALUATED_ROWS, batch_size * kind.per_edit)
    # Rows without a given answer are fed the model's own, which may be as long as an answer can be
    tokens, fed = rows * kind.tokens, rows * max(kind.labels, NEW_TOKENS)
    hidden = _STATES * (tokens + fed) * sizes.hidden * sizes.element
    scored = _PLANES_SCORED * min(float(LOGITS), fed * sizes.vocabulary * sizes.element)
    # As long as the longest row, answer included, and made longer once where an answer has more tokens
    cache = 1.5 * rows * (kind.tokens + NEW_TOKENS) * 2 * sizes.key * sizes.layers * sizes.element
    return {
        "evaluation rows": hidden + max(scored, sizes.running(max(tokens, fed))),
        "evaluation KV cache": min(cache, 1.5 * MEMORY),
    }
