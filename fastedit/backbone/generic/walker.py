"""The stock decoder's own forward, entered again at any layer on packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import AttentionPlan, Past, varlen_function
from ..packed import PackedState
from ..token_layout import Running, showing
from .attention import implementation_of, mix
from .context import Forward, walking
from .cross import ENCODED, STATES, attend_read, read_keys, seeing_tokens
from .decoder import Decoder
from .door import EMBEDDED, IDS, Joiner, Row
from .encoder import BIASES, biased_plan
from .masks import RowMask, plan_rows
from .mixers import call_padded, layouts_of, taken


class _Reached(Exception):
    """The walk is where it was to go."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Mixed(Exception):
    """The last layer's mixer has run."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class PackedWalk:
    """One run of the decoder over packed rows.

    Args:
        decoder: traced. state: where it begins. past: keys and values of earlier tokens, or None.
        first, stage: where ``entering`` (1, T, d) enters; with None the decoder is walked from its embeddings.
        until: where it ends, (layer, stage); None is the end, where only wanted tokens are left.
    """

    makes_masks = False

    def __init__(
        self,
        decoder: Decoder,
        state: PackedState,
        past: Past | None,
        *,
        entering: Tensor | None,
        until: tuple[int, str] | None,
    ) -> None:
        self.decoder, self.state, self.past = decoder, state, past
        self.entering, self.until = entering, until
        self.first, self.stage = (state.layer, state.stage) if entering is not None else (0, "attention")
        self.last = decoder.n_layers - 1
        self.tokens = sum(state.counts)
        self.wanted = state.wanted if until is None and len(state.wanted) != self.tokens else None
        self.index = -1
        # What a mixer of the running layer is replaced by, and whether it or the entry ends the run
        self._given: Tensor | None = None
        self._zero = self._catch_mixer = self._catch_entry = False
        # Whether attention runs that reads an encoder's states
        self._reading = False
        # What enters the running layer, and the tokens that it changes where it reads images; None is all
        self._hidden = state.hidden
        self._seeing: Tensor | None = None

    def root(self, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder."""
        return stock(*args, **kwargs)

    def layer(self, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Skip layers below the first; enter there; stop where the walk ends."""
        if index < self.first:
            hidden = args[0] if args else kwargs["hidden_states"]
            return self.decoder.returned(index, hidden)
        if self.decoder.encoded:
            # Attention gets the bias of its rows from their plan
            args, kwargs = (), self.decoder.arguments(index, args, kwargs) | dict.fromkeys(BIASES, True)
        if index == self.first and self.entering is not None:
            args, kwargs = _entered(args, kwargs, self.entering)
        self.index = index
        trace = self.decoder.traces[index]
        self._zero = index == self.first and self.stage == "ffn" and bool(trace.entry)
        if self.until is not None and self.until[0] == index:
            if self.until[1] == "attention" or not trace.entry:
                raise _Reached(args[0] if args else kwargs["hidden_states"])
            self._catch_entry = True
        if index in self.decoder.cross:
            return self._crossing(index, stock, args, kwargs)
        if index == self.last and self.wanted is not None:
            return self._last(stock, args, kwargs)
        return stock(*args, **kwargs)

    def _crossing(self, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer that reads images; rows without one pass by."""
        self._hidden = hidden = args[0] if args else kwargs["hidden_states"]
        self._seeing = seeing = self.state.remembered("seeing", lambda: seeing_tokens(self.state))
        if seeing is None and self._catch_entry:
            raise _Reached(hidden)
        wanted = self.wanted if index == self.last else None
        passing = hidden if wanted is None else hidden[:, wanted]
        if seeing is None:
            return self.decoder.returned(index, passing)
        output = stock(*args, **kwargs) if wanted is None else self._last(stock, args, kwargs)
        changed = seeing if wanted is None else seeing[wanted]
        after = output[0] if isinstance(output, tuple) else output
        marks = changed[:, None].to(after.device)
        return self.decoder.returned(index, torch.where(marks, after, passing.to(after.device)))

    def _last(self, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the last layer's mixer on all tokens, and what follows it on those that are wanted."""
        assert self.wanted is not None
        if not self._zero:
            self._catch_mixer = True
            try:
                stock(*args, **kwargs)
            except _Mixed as mixed:
                self._given = mixed.output[:, self.wanted.to(mixed.output.device)]
            finally:
                self._catch_mixer = False
        # Hooks that tell tokens by their number see a number that stands for the wanted ones
        read = {name: value for name, value in kwargs.items() if name == ENCODED}
        args, kwargs = taken(args, self.wanted, self.tokens), taken(kwargs, self.wanted, self.tokens) | read
        return stock(*args, **kwargs)

    def part(self, role: str, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand for a mixer or an entry."""
        if index != self.index:
            return stock(*args, **kwargs)
        if role == "token":
            return self._asked(stock, args, kwargs)
        if role == "entry":
            if self._catch_entry:
                reached = args[0] if args else next(iter(kwargs.values()))
                if index in self.decoder.cross and self._seeing is not None:
                    reached = torch.where(self._seeing[:, None], reached, self._hidden)
                raise _Reached(reached)
            return stock(*args, **kwargs)
        trace = self.decoder.traces[index]
        if role == "reader" and not self._zero:
            self._reading = True
            output = stock(*args, **kwargs)
            self._reading = False
            return output
        given = self._given
        if self._zero:
            given = (args[0] if args else kwargs["hidden_states"]).new_zeros(1)
            shape = (args[0] if args else kwargs["hidden_states"]).shape
            given = given.expand(shape)
        if given is not None:
            return (given, *[None] * (trace.mixer_length - 1)) if trace.mixer_length else given
        if trace.padded:
            output = call_padded(stock, args, kwargs, self.state, self._masks(index))
        else:
            output = stock(*args, **kwargs)
        if self._catch_mixer:
            raise _Mixed(output[0] if isinstance(output, tuple) else output)
        return output

    def _asked(self, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a linear map of the last layer's mixer on the wanted tokens alone; what it says of others is dropped."""
        given = args[0] if args else None
        if not self._catch_mixer or self.wanted is None or given is None or given.shape[:2] != (1, self.tokens):
            return stock(*args, **kwargs)
        wanted = self.wanted.to(given.device)
        output = stock(given[:, wanted])
        return output.new_zeros(1, self.tokens, output.shape[-1]).index_copy(1, wanted.to(output.device), output)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, None] | None:
        """Attention of every row's tokens over its own, or over its image."""
        tokens = query.shape[2]
        scale = options.get("scaling")
        scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
        if self._reading or self.index in self.decoder.cross:
            counts = self.state.counts if tokens == self.tokens else self.state.wanted_counts
            return attend_read(query, key, value, mask, counts, read_keys(self.state), scale), None
        biased = options.get("position_bias") is not None and not self.decoder.encoded
        if key.shape[2] != tokens or query.shape[0] != 1 or biased:
            got = f"queries={tuple(query.shape)}, keys={tuple(key.shape)}, {type(module).__name__}"
            raise ValueError(f"attention of a decoder must be that of tokens among themselves (got {got})")
        asked = self.wanted.to(query.device) if self._catch_mixer and self.wanted is not None else None
        queries = query[0].transpose(0, 1)
        mixed = mix(
            self.index,
            queries if asked is None else queries[asked],
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self._plan(asked, query.device, query.dtype),
            scale=scale,
            past=self.past,
            varlen=varlen_function(implementation_of(self.decoder.config), query.device),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )
        if asked is not None:
            mixed = mixed.new_zeros(tokens, mixed.shape[-1]).index_copy(0, asked, mixed)
        return mixed.view(1, tokens, query.shape[1], -1), None

    def _masks(self, index: int) -> list[RowMask]:
        return [None if row is None else row.masks[row.kinds[index]] for row in self.state.entries]

    def _plan(self, asked: Tensor | None, device: torch.device, dtype: torch.dtype) -> AttentionPlan:
        state, capacity = self.state, getattr(self.past, "capacity", None)
        key = ("rows", self.index, asked is None, capacity, dtype)
        known = state.memory.get(key)
        if known is None:
            masks = self._masks(self.index)
            counts = state.counts if asked is None else state.wanted_counts
            same = ("rows", tuple(map(id, masks)), asked is None, capacity, dtype)
            wanted = None if asked is None else self.wanted

            def make() -> AttentionPlan:
                if self.decoder.encoded:
                    return biased_plan(self.decoder.layers, state, wanted, counts, capacity, dtype)
                return plan_rows(state, masks, wanted, counts, capacity)

            known = state.remembered(same, make).to(device)
            state.memory[key] = known
        plan: AttentionPlan = known
        return plan


class Walker:
    """Walks a decoder that was traced.

    Args:
        decoder: of the model. joiner: of rows.
        resumes: whether a walk may begin at a layer; else it begins at the embeddings every time.
    """

    def __init__(self, decoder: Decoder, joiner: Joiner, *, resumes: bool = True) -> None:
        self.decoder, self.joiner, self.resumes = decoder, joiner, resumes

    @property
    def stores(self) -> bool:
        """Whether all that a layer keeps of earlier tokens is keys and values."""
        return not any(trace.padded for trace in self.decoder.traces)

    def state(
        self, rows: Sequence[Row | None], wanted: Tensor, wanted_counts: Sequence[int], *, first: Sequence[int] = ()
    ) -> PackedState:
        """Return the state entering layer 0 of some rows.

        Args:
            rows: R rows; None where a row has no tokens. wanted, wanted_counts: see `PackedState`.
            first: by row, the first of its tokens here; () is 0.
        """
        starts = tuple(first) or (0,) * len(rows)
        counts = tuple(0 if row is None else row.count - a for row, a in zip(rows, starts, strict=True))
        parts = [
            self._embedded(row)[0, a - row.first :] for row, a in zip(rows, starts, strict=True) if row is not None
        ]
        hidden = torch.cat(parts).to(wanted.device)
        places = [torch.arange(a, a + n, device=hidden.device) for a, n in zip(starts, counts, strict=True)]
        return PackedState(
            hidden=hidden,
            position_ids=torch.cat(places)[None],
            rotary=None,
            counts=counts,
            starts=starts,
            wanted=wanted,
            wanted_counts=tuple(wanted_counts),
            layer=0,
            stage="attention",
            entries=tuple(rows),
        )

    def _embedded(self, row: Row) -> Tensor:
        """Embeddings (1, N, d) of a row, of its ids where the decoder is handed those."""
        known: Tensor | None = row.values.get(EMBEDDED)
        return self.decoder.root.embed_tokens(row.values[IDS]) if known is None else known

    def prefix(self, state: PackedState, layer: int, stage: str, past: Past | None) -> PackedState:
        """Return the state at a later point. Under ``torch.no_grad``."""
        if (state.layer, state.stage) == (layer, stage):
            return state
        hidden = self._run(state, past, until=(layer, stage))
        entries = state.entries
        if self.resumes and layer > 0:
            entries = tuple(None if row is None else row.without(EMBEDDED) for row in entries)
        # Streams beside the first (Gemma 3n has four) are for the walk itself, which begins at the embeddings there
        hidden = hidden.reshape(-1, *hidden.shape[-2:])[0]
        return replace(state, hidden=hidden, layer=layer, stage=stage, entries=entries)

    def tail(self, state: PackedState, past: Past | None) -> Tensor:
        """Return the final hidden states (M, d) of the wanted tokens."""
        return self._run(state, past, until=None)

    def _run(self, state: PackedState, past: Past | None, *, until: tuple[int, str] | None) -> Tensor:
        entering = state.hidden[None] if self.resumes and (state.layer, state.stage) != (0, "attention") else None
        arguments = state.remembered("arguments", lambda: self.arguments(state))
        if EMBEDDED not in arguments and IDS not in arguments:
            # What enters a layer stands for the embeddings, whose values no layer reads then
            arguments = {**arguments, EMBEDDED: state.hidden[None]}
        walk = PackedWalk(self.decoder, state, past, entering=entering, until=until)
        with self.decoder.instrumented(), showing(self._layouts(state)), walking(walk):
            try:
                output = self.decoder.root(**arguments, use_cache=False)
            except _Reached as reached:
                return reached.hidden.to(state.hidden.device)
        final: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
        return final[0].to(state.hidden.device)

    def arguments(self, state: PackedState) -> dict[str, Any]:
        """Return the arguments of the decoder's forward for the tokens of a state, less what a walk sets itself."""
        joined = self.joiner.join(state.entries, state.starts, state.counts, state.hidden.device)
        if self.decoder.cross and STATES not in joined:
            # Without any, the stock forward would leave out layers that a walk may begin or end at
            joined[STATES] = state.hidden.new_zeros(1, 1, state.hidden.shape[-1])
        return joined

    def _layouts(self, state: PackedState) -> Running:
        return state.remembered("running", lambda: layouts_of(state, padded=not self.stores))


def _entered(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
