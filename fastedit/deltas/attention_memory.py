"""Latent in-context knowledge: attention outputs mixed with what a query finds in a memory of hidden states (UniKE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastedit.backbone import EditableModel, Site
from fastedit.backbone.placement import bare, returning
from fastedit.deltas.base import DeltaSpec, EditDelta
from fastedit.deltas.company import company
from fastedit.deltas.key_value import KeyValueDelta, Shapes, neurons, part_prefix, plain_options, side_by_side
from fastedit.deltas.questions import standing
from fastedit.deltas.rows import Rows, TokenSpans
from fastedit.ops import nearest_keys

READINGS, SEARCHES = ("attn", "raw"), ("codes", "states")
#: Options that say how a memory is read, and which.
CONSTANT = ("artifact", "reading", "search", "alpha", "top_k", "rescale")


class AttentionMemoryDelta(KeyValueDelta):
    """``h + s(x) a(x) (know(x) - h)`` at the end of attention blocks, beside extra neurons of feed-forward blocks.

    UniKE, arXiv 2409.19872, section 3.3, equations (3) to (5) and (7): x is what enters the block's query map, h what
    the block puts out, know(x) what x finds in the memory, a the inclusion of knowledge. Memory and encoder are
    constants that all edits share; they are those of the artifact that the model holds under the id in the spec.

    Ours is that an edit's own knowledge joins the memory, as it joins in-context demonstrations, and decides: s(x) is
    the share of those of its entries that are among what x finds. It is fitted and starts at 0, so that a fresh delta
    changes nothing, and what finds none of them is left as it is. The paper mixes everywhere and from the first step
    on; without own entries s is one number of the edit and layer, everywhere. Of all the entries of a sequence a query
    finds those of one edit, the one that has the nearest: shares are fitted to be the only ones.

    Sites are "o" (this) and "down" (see ``KeyValueDelta``, whose options and parts are here too).

    Options of the spec besides: ``artifact``, an id; ``top_k``; ``reading``, "attn" through the block's own maps or
    "raw" on hidden states; ``search``, whether "states" are compared or their "codes" in the semantic space; ``alpha``,
    "dynamic" or a number; ``rescale``, whether know is made as long as h; ``own``, m entries of the edit; ``gain``, a
    factor on what is fitted here; ``each``, how many of the m are an edit's, in the order of a sequence.
    Parts besides, after ``"{layer}.o:"``: ``share``, (B, m), or (B, 1) without entries; ``states`` (B, m, d), what is
    added to those that are read.
    Fixed besides: ``keys`` (B, m, d), that are searched; ``from`` (B, m, d), what is read before ``states`` are added;
    ``on`` (B, m), 1 at an entry.
    """

    def __init__(
        self, spec: DeltaSpec, size: int, *, dtype: torch.dtype, device: torch.device | str, trainable: bool
    ) -> None:
        self.own, self.gain = int(spec.options.get("own", 0)), float(spec.options.get("gain", 1.0))
        self._memories: dict[int, LayerMemory] = {}
        super().__init__(spec, size, dtype=dtype, device=device, trainable=trainable)

    @staticmethod
    def neuron_sites(spec: DeltaSpec) -> tuple[Site, ...]:
        """The sites that neurons stand beside."""
        return tuple(site for site in spec.sites if site.name == "down")

    @staticmethod
    def other_shapes(spec: DeltaSpec) -> tuple[Shapes, Shapes]:
        """Shapes of the parts and fixed tensors of the memory.

        Raises:
            ValueError: a site that ends no block, or a way to read or search that is not known.
        """
        for name, known in (("reading", READINGS), ("search", SEARCHES)):
            if spec.options.get(name, known[0]) not in known:
                given = spec.options[name]
                raise ValueError(f"attention_memory: {name} is one of {list(known)} (got {name}={given!r})")
        m = int(spec.options.get("own", 0))
        shapes: Shapes = {}
        fixed: Shapes = {}
        for site in spec.sites:
            if site.name not in ("o", "down"):
                raise ValueError(f"attention_memory: a memory stands beside 'o' (got site {site.layer}.{site.name})")
            prefix = part_prefix(site)
            if site.name == "o":
                shapes[f"{prefix}share"] = (max(m, 1),)
                if m:
                    shapes[f"{prefix}states"] = (m, site.d_out)
                    fixed |= {f"{prefix}keys": (m, site.d_out), f"{prefix}from": (m, site.d_out), f"{prefix}on": (m,)}
        return shapes, fixed

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
        reading = [site for site in self.spec.sites if site.name == "o"]
        if not reading or not wanted:
            return
        artifact = model.artifacts.get(wanted)
        if artifact is None:
            raise ValueError(
                "attention_memory: the model holds the memory that a delta reads; get it by fastedit.load_artifact and "
                f"put it into model.artifacts by its id (got artifact={wanted[:12]!r}, held {len(model.artifacts)})"
            )
        self._memories = {site.layer: LayerMemory(model, site, artifact.tensors, self.spec) for site in reading}

    def delta(self, site: int, x: Tensor, rows: Rows | TokenSpans, output: Tensor | None = None) -> Tensor:
        """Change of the module's output (tokens, d) for what the reader's module gets, tokens sorted by edit.

        Raises:
            ValueError: the spec names no artifact.
        """
        here = self.spec.sites[site]
        if here.name == "down":
            return neurons(self, here, x, rows)
        memory = self._memories.get(here.layer)
        if memory is None or output is None:
            raise ValueError(
                f"attention_memory: a spec names its artifact before it acts (got {dict(self.spec.options)})"
            )
        prefix, dtype = part_prefix(here), memory.states.dtype
        offsets = rows.offsets_tensor(x.shape[0], self.size, x.device)
        owner = torch.repeat_interleave(offsets.diff(), output_size=x.shape[0])
        share = self.gain * self.differentiable(f"{prefix}share")
        entries = None
        if self.own:
            states = self.fixed[f"{prefix}from"] + self.gain * self.differentiable(f"{prefix}states")
            keys, on = self.fixed[f"{prefix}keys"], self.fixed[f"{prefix}on"]
            entries = Entries(keys.to(dtype), states.to(dtype), on > 0, owner)
        return memory.towards(x.to(dtype), output.to(dtype), share.to(dtype)[owner], entries)


@dataclass(frozen=True)
class Entries:
    """What edits have in the memory, and whose tokens are whose.

    Args:
        keys: (B, m, d), what is searched. states: (B, m, d), what is read. on: (B, m) bool, entries that there are.
        owner: (T,), the edit of each token.
    """

    keys: Tensor
    states: Tensor
    on: Tensor
    owner: Tensor

    def of_tokens(self, values: Tensor) -> Tensor:
        """Values (B, ...) of edits as those of tokens: (T, ...), or (1, ...) of a single edit, whose tokens share them.

        What is computed of entries is computed of an edit's, and not again for each of its tokens: in a sequence one
        delta has the entries of all edits before.
        """
        return values if len(values) == 1 else values[self.owner]


class LayerMemory:
    """The memory of one layer on a model's device, ready to be read.

    Args:
        model: whose attention reads it. site: of the layer. tensors: of the artifact. spec: how it is read.
    Raises:
        ValueError: the artifact has no memory of this layer.
    """

    def __init__(self, model: EditableModel, site: Site, tensors: Mapping[str, Tensor], spec: DeltaSpec) -> None:
        prefix, options = f"{site.layer}:", spec.options
        if f"{prefix}semantic" not in tensors:
            raise ValueError(f"attention_memory: the artifact has a memory of layer {site.layer} (got none)")
        alpha = options.get("alpha", "dynamic")
        self.alpha = None if alpha == "dynamic" else float(alpha)
        self.top_k, self.rescale = int(options.get("top_k", 40)), bool(options.get("rescale", True))
        self.each = each_of(spec)
        self.raw, self.by_code = options.get("reading") == "raw", options.get("search") == "codes"
        maps = model.sites([site.layer], ["q", "k", "v", "o"])
        self.query, self.key, self.value, self.out = (model.module(found) for found in maps)
        attention: Any = model.adapter.text.layers[site.layer].self_attn
        self.width, self.scale = int(attention.head_dim), float(attention.scaling)
        # Some rotary decoders norm queries and keys by head
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.query_norm, self.key_norm = (None if norm is None else returning(norm) for norm in norms)
        if self.raw:
            # The mix of the paper's code, with the usual scale of the scores, which it leaves out
            self.width, self.scale, self.query_norm = site.d_out, site.d_out**-0.5, None
        self.encoder = [tensors[f"{prefix}enc_sem.{n}"].to(model.device, model.dtype) for n in range(4)]
        semantic, self.states = (tensors[prefix + n].to(model.device, model.dtype) for n in ("semantic", "positive"))
        self.searched = self._compared(semantic)
        self.keys, self.values = self._read(self.states)

    def towards(self, x: Tensor, output: Tensor, share: Tensor, own: Entries | None) -> Tensor:
        """``s a (know - h)`` (T, d) for queries x (T, d) and attention outputs h (T, d).

        Args:
            share: (T, m) of the edit's entries, or (T, 1) without any. own: those entries.
        """
        asked = self._compared(x)
        # What is found has no gradient
        near, index = nearest_keys(asked.detach(), self.searched, min(self.top_k, len(self.searched)), "cosine")
        found = None
        if own is not None:
            # An entry is found where it is nearer than the last of the memory that is
            alike = self._alike(asked.detach(), own).masked_fill(~own.of_tokens(own.on), -torch.inf)
            found = alike >= near[:, -1:]
            if self.each < alike.shape[1]:
                # Of several edits' entries those of the one that has the nearest, of equally near ones the latest
                nearest = alike.flip(1).argmax(1, keepdim=True) // self.each
                found &= torch.arange(alike.shape[1], device=x.device).flip(0) // self.each == nearest
            share = share * found
        know, mixed = self._known(x, index, own, found)
        if self.rescale:
            know = know * (output.norm(dim=1, keepdim=True) / know.norm(dim=1, keepdim=True).clamp(min=1e-6))
        difference = share.sum(1, keepdim=True) * (know - output)
        if self.alpha is not None:
            return self.alpha * difference
        # Per token, of states in one space. The paper's is one number of a sample, between a code and the attention's
        # output: with it an answer that is decoded would not be mixed like one that is read at once.
        codes = asked if self.by_code else encode(x, self.encoder)
        alpha = functional.cosine_similarity(encode(mixed, self.encoder), codes, dim=1)
        return alpha.clamp(0.0, 1.0)[:, None] * difference

    @torch.no_grad()
    def _alike(self, asked: Tensor, own: Entries) -> Tensor:
        """Cosines (T, m) of what is asked, (T, e), with the entries of its edit."""
        codes = functional.normalize(self._compared(own.keys), dim=-1)
        return torch.einsum("te,tme->tm", functional.normalize(asked, dim=-1), own.of_tokens(codes))

    def _known(self, x: Tensor, index: Tensor, own: Entries | None, found: Tensor | None) -> tuple[Tensor, Tensor]:
        """What queries x (T, d) find, (T, d), and the states that they attended to, mixed likewise, (T, d).

        Args:
            index: (T, k), entries of the memory. own: of the edits; found: (T, m) bool, which of them.
        """
        sources = [self._chosen(lambda held: held[index], self.states, self.keys, self.values)]
        if own is not None:
            sources.append(self._chosen(own.of_tokens, own.states, *self._read(own.states)))
        keys, values, states = zip(*sources, strict=True)
        query = x if self.raw else bare(self.query, x)
        # (T, groups, heads of a group, d_head): heads that share keys are so many queries
        query = query.view(len(x), -1, self.width)
        if self.query_norm is not None:
            query = self.query_norm(query)
        query = query.view(len(x), self.keys.shape[1], -1, self.width)
        scores = [torch.einsum("tghw,tkgw->tghk", query, key) * self.scale for key in keys]
        if found is not None:
            scores[-1] = scores[-1].masked_fill(~found[:, None, None], -torch.inf)
        weights = torch.split(torch.softmax(torch.cat(scores, -1), -1), [part.shape[-1] for part in scores], -1)
        parts = [torch.einsum("tghk,tkgw->tghw", w, value) for w, value in zip(weights, values, strict=True)]
        know = sum(parts[1:], parts[0]).flatten(1)
        if self.raw:
            return know, know
        parts = [torch.einsum("tk,tkd->td", w.mean((1, 2)), state) for w, state in zip(weights, states, strict=True)]
        return bare(self.out, know), sum(parts[1:], parts[0])

    def _chosen(self, choose: Callable[[Tensor], Tensor], states: Tensor, *read: Tensor) -> tuple[Tensor, ...]:
        """Keys, values and states that tokens read, (T, n, ...); chosen once where they are the same."""
        chosen = choose(states)
        return (*(self._read(chosen) if self.raw else map(choose, read)), chosen)

    def _read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., groups, d_head) of states (..., d), without positions."""
        if self.raw:
            return states[..., None, :], states[..., None, :]
        flat = states.flatten(0, -2)
        key, value = (bare(part, flat).view(*states.shape[:-1], -1, self.width) for part in (self.key, self.value))
        return (key if self.key_norm is None else self.key_norm(key)), value

    def _compared(self, states: Tensor) -> Tensor:
        """What is compared of states (..., d)."""
        return encode(states, self.encoder) if self.by_code else states


def each_of(spec: DeltaSpec) -> int:
    """Return how many of the entries are an edit's: all, but in a sequence."""
    return int(spec.options.get("each", spec.options.get("own", 0)))


def encode(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Codes (..., e) of states (..., d): two linear maps (d, d) and (d, e) with their biases, GELU between."""
    first, first_bias, second, second_bias = weights
    return functional.gelu(x @ first + first_bias) @ second + second_bias


def without_memory(delta: EditDelta) -> EditDelta:
    """Return what is left of a delta without its memory: its neurons."""
    feeding = AttentionMemoryDelta.neuron_sites(delta.spec)
    prefixes = tuple(part_prefix(site) for site in feeding)
    tensors = {name: tensor for name, tensor in delta.tensors.items() if name.startswith(prefixes)}
    return replace(delta, spec=replace(delta.spec, sites=feeding), tensors=tensors, merged=company([delta]))


def accumulate_attention_memory(deltas: Sequence[EditDelta]) -> EditDelta:
    """Neurons and own entries side by side, a query finding those of one edit; shares without entries are added.

    Raises:
        ValueError: deltas that read different memories, or in different ways.
    """
    spec = deltas[0].spec
    ways = {tuple(str(delta.spec.options.get(name)) for name in CONSTANT) for delta in deltas}
    counts = [int(delta.spec.options.get("own", 0)) for delta in deltas]
    each = {each_of(delta.spec) for delta in deltas}
    if len(ways) > 1 or len(each) > 1:
        detail = f"got {sorted(ways)}, entries of an edit {sorted(each)}"
        raise ValueError(f"attention_memory: deltas in sequence read one memory in one way ({detail})")
    feeding = AttentionMemoryDelta.neuron_sites(spec)
    tensors = side_by_side(deltas, feeding) if feeding else {}
    n = sum(int(delta.spec.options.get("n", 0)) for delta in deltas)
    options = {**(plain_options(spec, n) if feeding else spec.options), "gain": 1.0, "own": sum(counts)}
    options |= {"each": each.pop()} if options["own"] else {}
    gains = [float(delta.spec.options.get("gain", 1.0)) for delta in deltas]
    for site in spec.sites:
        if site.name != "o":
            continue
        prefix = part_prefix(site)
        shares = [gain * delta.tensors[f"{prefix}share"] for gain, delta in zip(gains, deltas, strict=True)]
        tensors[f"{prefix}share"] = torch.cat(shares) if options["own"] else torch.stack(shares).sum(0)
        if options["own"]:
            states = [gain * delta.tensors[f"{prefix}states"] for gain, delta in zip(gains, deltas, strict=True)]
            tensors[f"{prefix}states"] = torch.cat(states)
            tensors |= {prefix + n: torch.cat([d.tensors[prefix + n] for d in deltas]) for n in ("keys", "from", "on")}
            tensors[f"{prefix}on"] *= standing([delta.texts for delta in deltas], int(options["own"]))
    request_id = "+".join(delta.request_id for delta in deltas)
    return replace(deltas[0], spec=replace(spec, options=options), tensors=tensors, request_id=request_id)
