"""Latent in-context knowledge: attention outputs mixed with what a query finds in a memory of hidden states (UniKE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastedit.backbone import EditableModel, Site
from fastedit.deltas.base import DeltaSpec, EditDelta
from fastedit.deltas.key_value import KeyValueDelta, Shapes, neurons, place_of, plain_options, side_by_side
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops import nearest_keys

MODES = ("attn", "raw")


class AttentionMemoryDelta(KeyValueDelta):
    """``h + s a(x) (know(x) - h)`` at the end of attention blocks, beside extra neurons of feed-forward blocks.

    UniKE, arXiv 2409.19872, section 3.3, equations (3) to (5) and (7): x is what enters the block's query map, h what
    the block puts out, know(x) what x finds in the memory, a the inclusion of knowledge. The memory and its encoder are
    constants that all edits share; they are those of the artifact that the model holds under the id in the spec. Ours:
    s, one number per edit and layer that is fitted and starts at 0, so that a fresh delta changes nothing; the paper
    mixes from the first step on.

    Sites are "o" (this) and "down" (see ``KeyValueDelta``, whose options and parts are here too).

    Options of the spec: ``artifact``, an id; ``top_k``; ``mode``, "attn" or "raw"; ``alpha``, "dynamic" or a number;
    ``rescale``, whether know is made as long as h; ``gain`` g, with s = g p.
    Parts besides: ``"{layer}.o:share"`` p, (B, 1).
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        self.reading = [site for site in spec.sites if site.name != "down"]
        self._memories: dict[int, LayerMemory] = {}
        super().__init__(spec, size, dtype=dtype, device=device, trainable=trainable)

    @staticmethod
    def neuron_sites(spec: DeltaSpec) -> tuple[Site, ...]:
        """The sites that neurons stand beside."""
        return tuple(site for site in spec.sites if site.name == "down")

    @staticmethod
    def other_shapes(spec: DeltaSpec) -> Shapes:
        """Shapes of the shares.

        Raises:
            ValueError: a site that ends no block, or a mode that is not known.
        """
        reading = [site for site in spec.sites if site.name != "down"]
        for site in reading:
            if site.name != "o":
                raise ValueError(f"attention_memory: a memory stands beside 'o' (got site {site.layer}.{site.name})")
        if spec.options.get("mode", "attn") not in MODES:
            raise ValueError(f"attention_memory: mode is one of {list(MODES)} (got mode={spec.options['mode']!r})")
        return {f"{place_of(site)}share": (1,) for site in reading}

    def reader(self, site: int) -> str | None:
        """What queries the memory, and what the feed-forward block reads."""
        return "up" if self.spec.sites[site].name == "down" else "q"

    @torch.no_grad()
    def bind(self, model: EditableModel) -> None:
        """Take memory and encoders out of the artifact.

        Raises:
            ValueError: the model does not hold the artifact, or it has no memory of a layer.
        """
        wanted = str(self.spec.options.get("artifact", ""))
        if not self.reading or not wanted:
            return
        artifact = model.artifacts.get(wanted)
        if artifact is None:
            raise ValueError(
                "attention_memory: the model holds the delta's memory: read it with fastedit.load_artifact and put it "
                f"into model.artifacts under its id (got artifact={wanted[:12]!r}, held {len(model.artifacts)})"
            )
        self._memories = {
            site.layer: LayerMemory.of(model, site, artifact.tensors, **_settings(self.spec)) for site in self.reading
        }

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, output: Tensor | None = None) -> Tensor:
        """Change of the module's output (tokens, d) for what the reader's module gets, tokens sorted by edit."""
        here = self.spec.sites[site]
        if here.name == "down":
            return neurons(self, here, x, rows)
        memory = self._memories.get(here.layer)
        if memory is None:
            raise ValueError(f"attention_memory: a spec names its artifact before it acts (got {self.spec.options})")
        assert output is not None
        offsets = rows.offsets_tensor(x.shape[0], self.size, x.device)
        share = float(self.spec.options.get("gain", 1.0)) * self.differentiable(f"{place_of(here)}share")
        owner = torch.repeat_interleave(offsets.diff(), output_size=x.shape[0])
        # Where nothing is mixed in, h stays as it is to the bit
        return share.to(output.dtype)[owner] * memory.towards(x, output)


def _settings(spec: DeltaSpec) -> dict[str, Any]:
    options = spec.options
    alpha = options.get("alpha", "dynamic")
    return {
        "top_k": int(options.get("top_k", 40)),
        "mode": str(options.get("mode", "attn")),
        "alpha": None if alpha == "dynamic" else float(alpha),
        "rescale": bool(options.get("rescale", True)),
    }


@dataclass
class LayerMemory:
    """The memory of one layer, ready to be read.

    Args:
        semantic: (M, d), what is searched. states: (M, d), what is read.
        query, query_norm, out: the block's maps. keys, values: (M, groups, d_head), the states through its other two.
        scale: of the scores. encoder: weights and biases of the semantic encoder, in order; see ``encode``.
        top_k, mode, alpha, rescale: see ``AttentionMemoryDelta``; alpha None is dynamic.
    """

    semantic: Tensor
    states: Tensor
    query: nn.Module
    query_norm: nn.Module | None
    out: nn.Module
    keys: Tensor
    values: Tensor
    scale: float
    encoder: Sequence[Tensor]
    top_k: int
    mode: str
    alpha: float | None
    rescale: bool

    @staticmethod
    def of(model: EditableModel, site: Site, tensors: Any, **settings: Any) -> LayerMemory:
        """Put the memory of a site's layer on the model's device.

        Raises:
            ValueError: the artifact has none of this layer.
        """
        place = f"{site.layer}:"
        if f"{place}semantic" not in tensors:
            raise ValueError(f"attention_memory: the artifact has a memory of layer {site.layer} (got none)")
        semantic, states = (tensors[place + name].to(model.device, model.dtype) for name in ("semantic", "positive"))
        maps = [model.module(found) for found in model.sites([site.layer], ["q", "k", "v", "o"])]
        attention: Any = model.adapter.text.layers[site.layer].self_attn
        width = int(attention.head_dim)
        key, value = (bare(part, states).view(len(states), -1, width) for part in maps[1:3])
        # Some rotary decoders norm queries and keys by head
        by_head = getattr(attention, "q_norm", None)
        if by_head is not None:
            key = attention.k_norm(key)
        names = sorted(name for name in tensors if name.startswith(f"{place}enc_sem."))
        encoder = [tensors[name].to(model.device, model.dtype) for name in names]
        return LayerMemory(
            semantic, states, maps[0], by_head, maps[3], key, value, float(attention.scaling), encoder, **settings
        )

    def towards(self, x: Tensor, output: Tensor) -> Tensor:
        """``a (know - h)`` (T, d) for queries x (T, d) and attention outputs h (T, d)."""
        found, mixed = self.know(x)
        if self.rescale:
            found = found * (output.norm(dim=1, keepdim=True) / found.norm(dim=1, keepdim=True).clamp(min=1e-6))
        difference = found - output
        if self.alpha is not None:
            return self.alpha * difference
        near = functional.cosine_similarity(encode(mixed, self.encoder), encode(x, self.encoder), dim=1)
        return near.clamp(0.0, 1.0)[:, None] * difference

    def know(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What x (T, d) finds (T, d), and the states that it attended to, mixed likewise (T, d)."""
        _, index = nearest_keys(x, self.semantic, min(self.top_k, len(self.semantic)), "cosine")
        states = self.states[index]
        if self.mode == "raw":
            # The code's mix of hidden states, with the usual scale of the scores, which it leaves out
            weights = torch.softmax((states @ x[:, :, None])[:, :, 0] * x.shape[1] ** -0.5, dim=1)
            mixed = (weights[:, None] @ states)[:, 0]
            return mixed, mixed
        keys, values = self.keys[index], self.values[index]
        groups, width = keys.shape[2:]
        # (T, groups, heads of a group, d_head): heads that share keys are so many queries
        query = bare(self.query, x).view(len(x), -1, width)
        if self.query_norm is not None:
            query = self.query_norm(query)
        query = query.view(len(x), groups, -1, width)
        scores = torch.einsum("tghw,tkgw->tghk", query, keys) * self.scale
        weights = torch.softmax(scores, dim=-1)
        heads = torch.einsum("tghk,tkgw->tghw", weights, values).flatten(1)
        mixed = (weights.mean((1, 2))[:, None] @ states)[:, 0]
        return bare(self.out, heads), mixed


def bare(module: nn.Module, x: Tensor) -> Tensor:
    """A linear map without what is hooked to it or held of it: x (T, d_in) to (T, d_out)."""
    made: Tensor = type(module).forward(module, x)
    return made


def encode(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Encoded states: x (..., T, d) through W1, b1, W2, b2 in turn, GELU between; (..., d, e) and (..., 1, e)."""
    first, first_bias, second, second_bias = weights
    return functional.gelu(x @ first + first_bias) @ second + second_bias


def accumulate_attention_memory(deltas: Sequence[EditDelta]) -> EditDelta:
    """Neurons side by side, shares added.

    Two edits mix in sequence, which this does up to the product of their shares.

    Raises:
        ValueError: deltas with different memories.
    """
    spec = deltas[0].spec
    fixed = ("artifact", "mode", "alpha", "top_k", "rescale")
    kinds = {tuple(str(delta.spec.options.get(name)) for name in fixed) for delta in deltas}
    if len(kinds) > 1:
        raise ValueError(f"attention_memory: deltas in sequence share their memory (got {sorted(kinds)})")
    feeding = [site for site in spec.sites if site.name == "down"]
    tensors = side_by_side(deltas, feeding) if feeding else {}
    options = dict(spec.options)
    if feeding:
        options = plain_options(spec, sum(int(delta.spec.options["n"]) for delta in deltas))
    for site in spec.sites:
        if site.name == "o":
            name = f"{place_of(site)}share"
            parts = [float(delta.spec.options.get("gain", 1.0)) * delta.tensors[name] for delta in deltas]
            tensors[name] = torch.stack(parts).sum(0)
    request_id = "+".join(delta.request_id for delta in deltas)
    return replace(
        deltas[0], spec=replace(spec, options={**options, "gain": 1.0}), tensors=tensors, request_id=request_id
    )
