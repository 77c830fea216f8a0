"""A codebook of edits beside one layer (GRACE, arXiv 2211.11031)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.packed_forward import packed_prefix, packed_start
from fastedit.backbone.probe import feed_forward_parts
from fastedit.deltas import DeltaSpec, EditDelta
from fastedit.deltas.codebook import expecting, with_entry
from fastedit.deltas.random_mask import mask_key
from fastedit.deltas.scope import IN_SCOPE
from fastedit.fitting.prepared import EditRows
from fastedit.fitting.solver import SolverConfig
from fastedit.methods.base import Accumulation, Method, Resources, last_layers
from fastedit.objectives import Role
from fastedit.requests import EditRequest, Query
from fastedit.routers.ball import prompt_keys
from fastedit.settings import check_fit, check_ranges

#: Prompts of the pool whose median distance is the unit of radii, and how many are read at once.
POOL_PROMPTS, AT_ONCE = 256, 64
#: Bounds of a radius that is fitted to an edit's rows, as shares of the first one; and how far it may reach beyond the
#: furthest rephrased row and towards the nearest that must not change.
LEAST, MOST, BEYOND, SHORT_OF = 0.8, 1.3, 1.25, 0.9


@dataclass(frozen=True)
class GRACEConfig:
    """Settings of ``grace``.

    Args:
        layer: the layer whose feed-forward output is changed; None is the one at three quarters of the depth.
        epsilon: first radius of a ball, as a share of the median distance between two prompts of the pool.
        replace: a value replaces the block's output, as in the paper; else it is added to it.
        values: of an entry, for the last prompt token and those behind it one by one. The paper has one.
        split: shrink the balls of two edits in sequence that meet and whose targets differ (see ``with_entry``).
        steps: most optimiser steps.
        lr: of AdamW, the paper's.
        clip: largest gradient norm of an edit; None is off.
        stop_loss: stop an edit when its NLL is below this and every target token is the argmax; None never stops.
        check_every: the host asks every so many steps which edits have ended; the deltas are the same.
        capture: replay steps as CUDA graphs (``SolverConfig``); off, as no GPU has run it yet.
    """

    layer: int | None = None
    epsilon: float = 0.3
    replace: bool = True
    values: int = 32
    split: bool = True
    steps: int = 50
    lr: float = 1.0
    clip: float | None = None
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False

    def __post_init__(self) -> None:
        check_fit("grace", self)
        check_ranges("grace", self, at_least={"values": 1}, positive=("epsilon",))


class GRACE(Method):
    """One value per edit, which stands from the last prompt token on where a prompt's key lies in the edit's ball."""

    Config: ClassVar[type] = GRACEConfig
    sequence: ClassVar[Accumulation] = "route"

    @staticmethod
    def spec(model: EditableModel, config: GRACEConfig) -> DeltaSpec:
        """An entry beside the end of one feed-forward block."""
        sites = model.sites([deep_layer(config.layer, model.n_layers, "grace")], ("down",))
        options = {"positions": "answer", "router": "ball", "replace": config.replace, "values": config.values}
        return DeltaSpec("codebook", tuple(sites), options)

    @staticmethod
    def solver(model: EditableModel, config: GRACEConfig) -> SolverConfig:
        """AdamW per edit."""
        return SolverConfig(
            steps=config.steps,
            lr=config.lr,
            clip=config.clip,
            stop_loss=config.stop_loss,
            check_every=config.check_every,
            capture=config.capture,
        )

    @staticmethod
    def setup(model: EditableModel, config: GRACEConfig, resources: Resources) -> float | None:
        """The unit of radii: the median distance between keys of prompts of the pool; None without a pool."""
        asked = [Query(record.prompt, record.image) for record in resources.pool[:POOL_PROMPTS]]
        if len(asked) < 2:
            return None
        layer = deep_layer(config.layer, model.n_layers, "grace")
        keys = []
        for start in range(0, len(asked), AT_ONCE):
            encoded = model.encode(asked[start : start + AT_ONCE], answers=False)
            state = packed_prefix(model, packed_start(model, encoded), layer, "ffn")
            keys.append(prompt_keys(model, layer, state))
        return float(torch.pdist(torch.cat(keys).float()).median())

    @staticmethod
    def start(
        model: EditableModel,
        config: GRACEConfig,
        shared: float | None,
        requests: Sequence[EditRequest],
        rows: Sequence[EditRows],
    ) -> list[Mapping[str, Tensor]]:
        """Keys, radii and labels; and, where it replaces the output, a value that is the unedited one."""
        layer = deep_layer(config.layer, model.n_layers, "grace")
        prefix = f"{layer}.down:"
        found: list[Mapping[str, Tensor]] = []
        for request, edit_rows in zip(requests, rows, strict=True):
            keys = prompt_keys(model, layer, edit_rows.state)
            edit = edit_rows.row_roles.index(int(Role.EDIT))
            distances = torch.linalg.vector_norm((keys - keys[edit]).float(), dim=1)
            # Without a pool: what lies between keys of this length that have nothing in common
            unit = math.sqrt(2) * float(keys[edit].float().norm()) if shared is None else shared
            values = {
                f"{prefix}key": keys[edit],
                f"{prefix}radius": _radius(config.epsilon * unit, distances, edit_rows.row_roles),
                f"{prefix}length": torch.tensor([float(edit_rows.state.wanted_counts[edit])]),
                f"{prefix}label": torch.tensor(mask_key(0, request.target.strip().lower())),
            }
            if config.replace:
                state = edit_rows.state.of_row(edit)
                output = feed_forward_parts(model, layer, state.hidden[state.wanted[: config.values]], "down")[1]
                values[f"{prefix}value"] = torch.cat(
                    [output, output.new_zeros(config.values - len(output), output.shape[1])]
                )
            found.append(values)
        return found

    @staticmethod
    def combine(config: GRACEConfig, committed: Sequence[EditDelta], new: EditDelta) -> list[EditDelta]:
        """One more entry."""
        return with_entry(committed, new) if config.split else [*committed, new]

    @staticmethod
    def expecting(config: GRACEConfig, committed: list[EditDelta], coming: Sequence[EditDelta]) -> list[EditDelta]:
        """Entries that look for what is nearest to many of these at a time."""
        return expecting(committed, coming) if config.split else committed


def deep_layer(layer: int | None, n_layers: int, owner: str) -> int:
    """A layer number of this model; None is the layer at three quarters of the depth.

    Raises:
        ValueError: a layer that the model does not have.
    """
    return last_layers((3 * n_layers // 4 - 1,) if layer is None else (layer,), n_layers, owner)[0]


def _radius(first: float, distances: Tensor, roles: Sequence[int]) -> Tensor:
    """(1,) the radius of an edit whose rows lie at these distances (R,) from its key.

    The paper knows one row when an edit is made, and gives it the first radius. Where objectives have rows that must
    not change, the ball reaches a third of the way from the furthest rephrased one to the nearest of those, within
    bounds around the first radius, unless rephrased ones lie further out; it never takes in one that must not change.
    """
    outside = min((float(d) for d, role in zip(distances, roles, strict=True) if role not in IN_SCOPE), default=None)
    if outside is None:
        return torch.tensor([first])
    inside = max(float(d) for d, role in zip(distances, roles, strict=True) if role in IN_SCOPE)
    reach = max((2 * min(inside, outside) + outside) / 3, LEAST * first)
    return torch.tensor([min(reach, max(MOST * first, BEYOND * inside), SHORT_OF * outside)])
