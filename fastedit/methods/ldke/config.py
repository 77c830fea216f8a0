"""Settings of ``ldke``, and the layers that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.methods.base import last_layers
from fastedit.methods.ldke.localize import GROUPS, SCORES
from fastedit.settings import check_fit, check_ranges
from fastedit.training.config import MANY_RECORDS

CHOICES = ("auto", "voted", "random")
POSITIONS = ("all", "after_image", "answer")
#: Settings that are numbers of something, at least one.
COUNTS = ("candidates", "top", "rank", "calibration", "n_views", "stored", "valid_records", "size", "queries", "key")
#: Rewordings of a record where so many records can teach them.
WORDINGS = 4
#: Most candidates that are taken without being named.
MOST_CANDIDATES = 8


@dataclass(frozen=True)
class LDKEConfig:
    """Settings of ``ldke``; candidates and those of the classifier must be the ones that it was trained with.

    Args:
        candidates: layers that an edit may choose from, an int n for the last n, or numbers; None is those behind the
            first quarter of the decoder, eight of them evenly spread where there are more. The classifier reads the
            states before the feed-forward block of the first.
        layers: "auto", an edit's own by localization; "voted", one set by vote of training records; "random", a
            control; an int n, the last n candidates; or numbers.
        top: layers of an edit where they are not named.
        window: localization takes neighbours among the candidates.
        score: of a layer, "activation" (gradient times activation) or "weight" (norm of the weight's gradient).
        groups: tokens that count for "activation": of "last" (end of the prompt), "answer" and "image".
        probes: weight of what must not change, against a layer.
        calibration: training records that vote.
        positions: tokens that the change acts on: "all", "after_image" (behind the image) or "answer" (the end of a
            prompt and the answer behind it).
        rank: r. alpha: the change is scaled by alpha / rank.
        steps, lr, clip, weight_decay: of AdamW; lr None is 1.2 / hidden size (3e-4 at 4096).
        stop_loss: stop an edit when the NLL of its worst fitted view is below this and all are right; None never stops.
        check_every: the host asks every so many steps which edits have ended; the deltas are the same.
        capture: replay steps as CUDA graphs (``SolverConfig``); off, as no GPU has run it yet.
        rephrase_weight: of the NLL of rephrased views. kl_weight: of the KL on locality views.
        n_views: views of every role but the edit's own that it is fitted on: so many paraphrases, pictures and
            questions that must stay. More hold more wordings, at their price (docs/methods.md).
        route: False lets the change act on every input: what it does without the classifier.
        threshold: probability at which an edit acts; None is the one that training set.
        size, queries, key: of the classifier's heads, see ``ClassifierShape``.
        wordings: rewordings of every record's questions (``fastedit.fitting.wordings``) that the classifier learns
            from: so many of what the edit is to act on, and as many of what it is not. With any it also learns to
            refuse questions of other records that share most words with the record's own and that the unedited model
            answers otherwise about its image. None is 4, or 0 where training has fewer than 300 records, too few to
            learn from rewordings (docs/methods.md).
        stored: edits in sequence that the threshold is set for.
        false_rate: share of foreign questions on which any stored edit may act, however many there are, which training
            sets how alike images must be for (``fastedit.routers.agreement``); None is the threshold alone.
        contrast, decorrelation: weights in the classifier's loss, see ``ClassifierTask``.
        valid_records: of those given for training, kept for validation and for the threshold.
        row_cache_mib: memory for states that are computed once for all steps of training.
        seed: of the first factor and of the classifier's first weights.
    """

    candidates: int | tuple[int, ...] | None = None
    layers: str | int | tuple[int, ...] = "auto"
    top: int = 3
    window: bool = False
    score: str = "activation"
    groups: tuple[str, ...] = GROUPS
    probes: float = 0.5
    calibration: int = 64
    positions: str = "answer"
    rank: int = 8
    alpha: float = 32.0
    steps: int = 100
    lr: float | None = None
    clip: float | None = 1.0
    weight_decay: float = 0.0
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False
    rephrase_weight: float = 1.0
    kl_weight: float = 1.0
    n_views: int = 1
    route: bool = True
    threshold: float | None = None
    size: int = 256
    queries: int = 8
    key: int = 64
    wordings: int | None = None
    stored: int = 1000
    false_rate: float | None = 0.01
    contrast: float = 0.1
    decorrelation: float = 0.01
    valid_records: int = 200
    row_cache_mib: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_fit("ldke", self)
        check_ranges(
            "ldke",
            self,
            at_least={**dict.fromkeys(COUNTS, 1), "wordings": 0},
            positive=("alpha",),
            not_negative=("rephrase_weight", "kl_weight", "contrast", "decorrelation", "probes", "row_cache_mib"),
        )
        if isinstance(self.layers, str) and self.layers not in CHOICES:
            raise ValueError(f"ldke: layers is one of {list(CHOICES)} or names layers (got layers={self.layers!r})")
        if self.positions not in POSITIONS:
            raise ValueError(f"ldke: positions is one of {list(POSITIONS)} (got positions={self.positions!r})")
        if self.score not in SCORES:
            raise ValueError(f"ldke: score is one of {list(SCORES)} (got score={self.score!r})")
        if not self.groups or set(self.groups) - set(GROUPS):
            raise ValueError(f"ldke: groups are of {list(GROUPS)} (got groups={self.groups!r})")
        if self.false_rate is not None and not 0 < self.false_rate < 1:
            raise ValueError(f"ldke: false_rate is a share, or None (got false_rate={self.false_rate!r})")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"ldke: threshold is a probability (got threshold={self.threshold!r})")


def wordings_of(config: LDKEConfig, records: int) -> int:
    """How many rewordings of each of so many records the classifier learns from."""
    if config.wordings is not None:
        return config.wordings
    return WORDINGS if records >= MANY_RECORDS else 0


def candidate_layers(config: LDKEConfig, n_layers: int) -> tuple[int, ...]:
    """Layers that an edit may choose from, rising.

    Raises:
        ValueError: a layer that the model does not have; the last one alone, before whose feed-forward block nothing of
            a prompt is left but its end; or fewer than an edit has.
    """
    if config.candidates is None:
        first, last = min(n_layers // 4, n_layers - 1), n_layers - 1
        count = min(MOST_CANDIDATES, n_layers - first)
        layers = tuple(sorted({first + round(n * (last - first) / max(1, count - 1)) for n in range(count)}))
    else:
        layers = last_layers(config.candidates, n_layers, "ldke")
    if layers == (n_layers - 1,) and config.route:
        raise ValueError(
            "ldke: candidates include an earlier layer than the last, at whose feed-forward block the classifier sees "
            f"the end of a prompt alone (got candidates={config.candidates!r})"
        )
    if slots_of(config, layers) > len(layers):
        raise ValueError(
            f"ldke: an edit has at most as many layers as there are candidates, {list(layers)} (got top={config.top}, "
            f"layers={config.layers!r})"
        )
    return layers


def slots_of(config: LDKEConfig, candidates: Sequence[int]) -> int:
    """How many layers an edit changes."""
    if isinstance(config.layers, int):
        return config.layers
    if isinstance(config.layers, str):
        return min(config.top, len(candidates))
    return len(set(config.layers))


def named_positions(config: LDKEConfig, n_layers: int) -> tuple[int, ...] | None:
    """Places among the candidates of the layers that the settings name; None where they name none.

    Raises:
        ValueError: a layer that is no candidate.
    """
    candidates = candidate_layers(config, n_layers)
    if isinstance(config.layers, str):
        return None
    if isinstance(config.layers, int):
        return tuple(range(len(candidates) - config.layers, len(candidates)))
    chosen = last_layers(config.layers, n_layers, "ldke")
    if set(chosen) - set(candidates):
        raise ValueError(f"ldke: layers are of the candidates {list(candidates)} (got layers={config.layers!r})")
    return tuple(candidates.index(layer) for layer in chosen)


def trained_settings(model: EditableModel, config: LDKEConfig) -> dict[str, Any]:
    """The settings that an edit and its classifier share."""
    return {
        "candidates": list(candidate_layers(config, model.n_layers)),
        **{name: getattr(config, name) for name in ("size", "queries", "key")},
    }
