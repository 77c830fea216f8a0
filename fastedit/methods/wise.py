"""A side memory of one weight, fitted inside a random part of it, that acts on what it moves far (WISE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.probe import feed_forward_parts
from fastedit.backbone.token_layout import token_layout
from fastedit.deltas import DeltaSpec, EditDelta, Rows, TokenSpans, accumulate
from fastedit.deltas.questions import questions_of
from fastedit.deltas.random_mask import mask_key
from fastedit.deltas.scope import TOKENS, row_marks
from fastedit.deltas.side import empty_side, merged_side, moved, part_prefix
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, Method
from fastedit.methods.grace import deep_layer
from fastedit.objectives import NLLObjective, Objective, Role
from fastedit.requests import EditRequest
from fastedit.settings import check_fit, check_ranges


@dataclass(frozen=True)
class WISEConfig:
    """Settings of ``wise``.

    Args:
        layer: the layer that gets a side memory; None is the one at three quarters of the depth.
        name: of the linear map there, "down" or "up" (the paper's choice for ungated blocks).
        keep: share of the entries that an edit may change.
        alpha, beta, gamma: margins, see ``fastedit.deltas.side``, in units of the frozen activations' norm. The paper
            has 5, 20 and 10 in absolute numbers; here their proportions stay.
        weight: of the margins in the loss.
        share: of the smallest distance of an edit's rows, from which on it acts. The paper has 0.4.
        tokens: of a prompt, that distances are averaged over: "all" as in the paper, "after_image" or "last". An
            image's tokens are the same whatever is asked about it, and there are many.
        shard: in sequence, edits that one memory takes up before the next begins; None is 500 for a matrix of 4096 by
            11008, as in the paper's code, and in proportion for others, at least 1.
        merge_every: in sequence, edits after which the memories that are not merged yet become one (the paper: 1000);
            None never merges.
        density: of TIES-merging.
        retrieve: merged memories stay apart, and the one that moves a prompt most, measured by its threshold, acts;
            else they are merged as well.
        steps: most optimiser steps.
        lr: of AdamW; None is 6 / hidden size. The paper has SGD at 1.0.
        clip: largest gradient norm of an edit; None is off.
        radius: largest absolute value of an entry of the change.
        stop_loss: stop an edit when its NLL is below this and every target token is the argmax, whatever its margins;
            None never stops.
        check_every: the host asks every so many steps which edits have ended; the deltas are the same.
        capture: replay steps as CUDA graphs (``SolverConfig``); off, as no GPU has run it yet.
        seed: of the masks.
    """

    layer: int | None = None
    name: str = "down"
    keep: float = 0.2
    alpha: float = 0.5
    beta: float = 2.0
    gamma: float = 1.0
    weight: float = 1.0
    share: float = 0.75
    tokens: str = "last"
    shard: int | None = None
    merge_every: int | None = None
    density: float = 0.53
    retrieve: bool = True
    steps: int = 100
    lr: float | None = None
    clip: float | None = 1.0
    radius: float | None = 1.0
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("up", "down"):
            raise ValueError(f"wise: name is 'up' or 'down' (got name={self.name!r})")
        if self.tokens not in TOKENS:
            raise ValueError(f"wise: tokens is one of {list(TOKENS)} (got tokens={self.tokens!r})")
        for name in ("keep", "share", "density"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"wise: {name} lies in 0 to 1 (got {name}={value!r})")
        if not 0 <= self.alpha <= self.beta or not self.gamma >= 0:
            got = f"alpha={self.alpha!r}, beta={self.beta!r}, gamma={self.gamma!r}"
            raise ValueError(f"wise: margins are 0 <= alpha <= beta and gamma >= 0 (got {got})")
        check_fit("wise", self)
        check_ranges("wise", self, at_least={"shard": 1, "merge_every": 1}, not_negative=("weight",))


class WISE(Method):
    """A side memory beside one linear map."""

    Config: ClassVar[type] = WISEConfig
    sequence: ClassVar[Accumulation] = "accumulate"

    @staticmethod
    def spec(model: EditableModel, config: WISEConfig) -> DeltaSpec:
        """A side memory, routed by distance."""
        sites = model.sites([deep_layer(config.layer, model.n_layers, "wise")], (config.name,))
        names = ("keep", "tokens", "alpha", "beta", "gamma", "weight", "share")
        return DeltaSpec(
            "side", tuple(sites), {"router": "distance", **{name: getattr(config, name) for name in names}}
        )

    @staticmethod
    def solver(model: EditableModel, config: WISEConfig) -> SolverConfig:
        """AdamW per edit."""
        return SolverConfig(
            steps=config.steps,
            lr=6.0 / model.hidden_size if config.lr is None else config.lr,
            clip=config.clip,
            radius=config.radius,
            stop_loss=config.stop_loss,
            check_every=config.check_every,
            capture=config.capture,
        )

    @staticmethod
    def objective(config: WISEConfig) -> Objective:
        """The NLL of the edit and of another wording of it, beside rows that must not change, for the margins."""
        return NLLObjective(fitted=(Role.EDIT, Role.TEXT_REPHRASE), beside=(Role.TEXT_LOCALITY, Role.IMAGE_LOCALITY))

    @staticmethod
    def start(
        model: EditableModel,
        config: WISEConfig,
        shared: None,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[Mapping[str, Tensor]]:
        """Keys of masks and units of distances."""
        spec = WISE.spec(model, config)
        prefix, layer = part_prefix(spec), spec.sites[0].layer
        found: list[Mapping[str, Tensor]] = []
        for request, edit_rows in zip(requests, rows, strict=True):
            state = edit_rows.state.of_row(edit_rows.row_roles.index(int(Role.EDIT)))
            spans = TokenSpans.of(Rows(), state.counts, 1, state.live)
            spans.layout = token_layout(state)
            marks = row_marks(spans, 1, state.hidden.device)
            assert marks is not None
            _, output = feed_forward_parts(model, layer, state.hidden[marks.counted(config.tokens)], config.name)
            # silu(0) is 0: how far the frozen activations are from nothing
            norms = moved(torch.zeros_like(output), output)
            found.append(
                {
                    f"{prefix}mask": torch.tensor(
                        mask_key(config.seed, f"{request.id}|{request.prompt}|{request.target}")
                    ),
                    f"{prefix}unit": norms.mean()[None],
                    f"{prefix}edits": torch.ones(1),
                }
            )
        return found

    @staticmethod
    def active_while_fitting(config: WISEConfig, committed: Sequence[EditDelta], question: str = "") -> list[EditDelta]:
        """The memory that the edit goes into: the one that has its question, else the one that is being filled."""
        held = _holding(committed, [question])
        chosen = committed[-1:] if held is None else [committed[held]]
        return [memory for memory in chosen if _count(memory)]

    @staticmethod
    def combine(config: WISEConfig, committed: Sequence[EditDelta], new: EditDelta) -> list[EditDelta]:
        """Memories after one more edit: merged ones, full ones, and last the one that is being filled.

        WISE, arXiv 2405.14768, section 2.3.2. A memory that is full is closed and an empty one begins. Ours: an edit
        whose question a memory answers already goes into that one, and so the later answer stands.
        """
        known = _holding(committed, questions_of(new.texts))
        if known is not None and known < len(committed) - 1:
            return [*committed[:known], _grown(committed[known], new), *committed[known + 1 :]]
        *closed, filling = committed or [empty_side(new)]
        edits = f"{part_prefix(new.spec)}edits"
        filling = _grown(filling, new)
        if float(filling.tensors[edits]) < _shard(config, new.spec):
            return [*closed, filling]
        closed.append(filling)
        merged = f"{part_prefix(new.spec)}merged"
        shards = [memory for memory in closed if not float(memory.tensors[merged])]
        held = sum(float(shard.tensors[edits]) for shard in shards)
        if config.merge_every is not None and held >= config.merge_every:
            before = [memory for memory in closed if float(memory.tensors[merged])]
            if config.retrieve:
                closed = [*before, merged_side(shards, config.density)]
            else:
                closed = [merged_side([*before, *shards], config.density)]
        return [*closed, empty_side(new)]


def _holding(committed: Sequence[EditDelta], questions: Sequence[str]) -> int | None:
    """Number of the last memory that has one of the questions."""
    asked = {question for question in questions if question}
    found = [number for number, memory in enumerate(committed) if not asked.isdisjoint(questions_of(memory.texts))]
    return found[-1] if found else None


def _count(memory: EditDelta) -> float:
    return float(memory.tensors[f"{part_prefix(memory.spec)}edits"])


def _grown(memory: EditDelta, new: EditDelta) -> EditDelta:
    """A memory with one more edit, which was fitted on top of it."""
    if not _count(memory):
        return new
    merged = f"{part_prefix(new.spec)}merged"
    grown = accumulate([memory, new])
    return replace(grown, tensors={**grown.tensors, merged: memory.tensors[merged]})


def _shard(config: WISEConfig, spec: DeltaSpec) -> int:
    """How many edits a memory takes up."""
    if config.shard is not None:
        return config.shard
    (site,) = spec.sites
    return max(1, round(500 * site.d_in * site.d_out / (4096 * 11008)))
