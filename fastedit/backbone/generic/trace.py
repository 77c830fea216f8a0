"""A few rows through a decoder: what its layers are made of, and whether packed rows come out as rows alone do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .context import Forward, walking
from .decoder import Decoder
from .door import Joiner, Row
from .layers import EXACT, Alone, look, tuple_length
from .walker import PackedWalk, Walker

#: Largest difference between packed rows and rows alone, relative to the largest number, by type. Stock models of any
#: type round to float32 in places, where torch's attention does not; a wrong mask or position is 1e-2 and more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
#: Decoders with more parameters than this are checked in one layer of each kind.
WHOLE = 50_000_000


class Some(PackedWalk):
    """A packed walk through some layers only."""

    layers: frozenset[int] = frozenset()

    def layer(self, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Skip the others."""
        if index not in self.layers:
            return self.decoder.returned(index, args[0] if args else kwargs["hidden_states"])
        return super().layer(index, stock, args, kwargs)


@torch.no_grad()
def trace_decoder(decoder: Decoder, rows: Sequence[Row], stock_rows: Sequence[dict[str, Any]]) -> Walker:
    """Look into every kind of layer, choose how it is walked, and compare.

    Args:
        decoder: not traced yet. rows: at least two of different lengths. stock_rows: arguments of the decoder's own
            forward for them, with which it makes masks and positions as for any model.
    Raises:
        ValueError: packed rows differ from rows alone, whatever is tried. Says by how much.
    """
    joiner = Joiner()
    joiner.learn(rows)
    kinds = _kinds(decoder, rows[0])
    chosen = _chosen(decoder, kinds)
    walker = Walker(decoder, joiner)
    alone = Alone(decoder, chosen)
    for inputs in stock_rows:
        # Layers that read images run in rows with one only
        if not set(chosen) <= set(alone.calls):
            with walking(alone):
                _run(decoder, inputs)
    unseen = sorted(set(chosen) - set(alone.calls))
    if unseen:
        raise ValueError(f"load: every decoder layer must run for one of the sample rows (got none for {unseen})")
    for index in chosen:
        decoder.traces[index] = look(decoder, alone, index)
    for numbers in kinds.values():
        for number in numbers:
            decoder.traces[number] = replace(decoder.traces[numbers[0]])
    decoder.instrument_parts()
    shares = _shares(decoder)
    if not shares:
        # Of its kind the last layer is checked alone, with all tokens and with wanted ones
        last = decoder.n_layers - 1
        alike = next(numbers for numbers in kinds.values() if last in numbers)
        for index in (*(number for number in chosen if number not in alike), last):
            _choose(decoder, walker, rows, stock_rows, [index], kinds)
    whole = shares or sum(part.numel() for part in decoder.layers.parameters()) <= WHOLE
    if whole:
        gap = _gap(decoder, walker, rows, stock_rows, range(decoder.n_layers))
        if gap > _tolerance(decoder):
            raise _refused(decoder, gap)
    walker.resumes = (decoder.encoded or not shares) and _resumes(
        decoder, walker, rows, range(decoder.n_layers) if whole else chosen
    )
    return walker


def _shares(decoder: Decoder) -> bool:
    """Whether layers hand keys, values or biases to later ones, so that none can be run without those before it."""
    return decoder.encoded or bool(getattr(decoder.config, "num_kv_shared_layers", 0))


def _chosen(decoder: Decoder, kinds: dict[Any, list[int]]) -> list[int]:
    """The first layer of every kind; all where they depend on each other."""
    if _shares(decoder):
        return list(range(decoder.n_layers))
    return sorted({numbers[0] for numbers in kinds.values()})


@torch.no_grad()
def sample_logits(decoder: Decoder, forward: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Final hidden states (1, N, d) of a row, no layer run, and the logits (1, N, V) of the stock forward."""
    alone = Alone(decoder, [])
    with walking(alone):
        try:
            logits: Tensor = forward(**inputs, use_cache=False).logits
        except AttributeError:
            # Some whole models cannot wrap up what their language model gives them (Llama 4, transformers 5.24)
            logits = decoder.hf.language_model(**inputs, use_cache=False).logits
    assert alone.final is not None
    return alone.final, logits


@torch.no_grad()
def learn_returns(decoder: Decoder, ids: Tensor) -> None:
    """Find out which layers return tuples, by running the first of every kind on some tokens (1, N)."""
    kinds = _kinds(decoder, None)
    with walking(_First(decoder, kinds)):
        _run(decoder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class _First(Alone):
    """Runs the first layer of every kind, and takes the others for the same."""

    def __init__(self, decoder: Decoder, kinds: dict[Any, list[int]]) -> None:
        super().__init__(decoder, _chosen(decoder, kinds))
        self.same = {numbers[0]: numbers for numbers in kinds.values()}

    def layer(self, index: int, stock: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().layer(index, stock, args, kwargs)
        for number in self.same.get(index, ()):
            self.decoder.traces[number].length = tuple_length(output)
        return output


def _run(decoder: Decoder, inputs: dict[str, Any]) -> Tensor:
    output = decoder.root(**inputs, use_cache=False)
    final: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return final


def _kinds(decoder: Decoder, row: Row | None) -> dict[Any, list[int]]:
    """Layers that are made of the same modules and see the same masks, by that."""
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(decoder.layers):
        parts = tuple(
            (path, type(part).__name__, *(tuple(p.shape) for p in part.parameters(recurse=False)))
            for path, part in layer.named_modules()
        )
        flags = tuple(
            (path, name, value)
            for path, part in layer.named_modules()
            for name, value in sorted(vars(part).items())
            if isinstance(value, (bool, str)) and name != "training"
        )
        found.setdefault((parts, flags, None if row is None else row.kinds[index]), []).append(index)
    return found


def _choose(
    decoder: Decoder,
    walker: Walker,
    rows: Sequence[Row],
    stock_rows: Sequence[dict[str, Any]],
    layers: Sequence[int],
    kinds: dict[Any, list[int]],
) -> None:
    """Walk a kind of layer on packed rows; where that differs, call its mixer on padded ones."""
    gap = _gap(decoder, walker, rows, stock_rows, layers)
    if gap <= _tolerance(decoder):
        return
    same = next(numbers for numbers in kinds.values() if layers[0] in numbers)
    if not decoder.traces[layers[0]].padded:
        for number in same:
            decoder.traces[number].padded = True
        padded = _gap(decoder, walker, rows, stock_rows, layers)
        if padded <= _tolerance(decoder):
            return
        gap = min(gap, padded)
    raise _refused(decoder, gap)


def _gap(
    decoder: Decoder,
    walker: Walker,
    rows: Sequence[Row],
    stock_rows: Sequence[dict[str, Any]],
    layers: Sequence[int],
) -> float:
    """Largest difference of final hidden states, relative to the largest number."""
    alone = []
    for inputs in stock_rows:
        with walking(Alone(decoder, layers)):
            alone.append(_run(decoder, inputs)[0])
    expected = torch.cat(alone).to(decoder.device)
    ends = torch.tensor([row.count for row in rows], device=expected.device).cumsum(0) - 1
    worst = 0.0
    everything = torch.arange(len(expected), device=expected.device)
    # Tokens that nobody asks for are left out in the last layer only
    for wanted in (everything, ends) if decoder.n_layers - 1 in layers else (everything,):
        counts = [1] * len(rows) if wanted is ends else [row.count for row in rows]
        state = walker.state(rows, wanted, counts)
        arguments = walker.arguments(state)
        walk = Some(decoder, state, None, entering=None, until=None)
        walk.layers = frozenset(layers)
        with walking(walk):
            packed = _run(decoder, arguments)[0].to(expected.device)
        target = expected[wanted]
        if packed.shape != target.shape:
            return float("inf")
        gap = (packed - target).abs().max() / target.abs().max().clamp(min=1e-6)
        worst = max(worst, float(gap) if bool(torch.isfinite(gap)) else float("inf"))
    return worst


def _resumes(decoder: Decoder, walker: Walker, rows: Sequence[Row], layers: Sequence[int]) -> bool:
    """Whether a walk that ends at a layer and begins there again ends where a whole one does."""
    if len(layers) < decoder.n_layers:
        return True
    counts = [row.count for row in rows]
    state = walker.state(rows, torch.arange(sum(counts), device=decoder.device), counts)
    whole = walker.tail(state, None)
    scale = whole.abs().max().clamp(min=1e-6)
    for layer in range(decoder.n_layers):
        for stage in ("attention", "ffn"):
            try:
                again = walker.tail(walker.prefix(state, layer, stage, None), None)
            except (RuntimeError, ValueError, KeyError):
                return False
            gap = (again - whole).abs().max() / scale
            if again.shape != whole.shape or not bool(gap <= EXACT.get(whole.dtype, 1e-5)):
                return False
    return True


def _tolerance(decoder: Decoder) -> float:
    dtype = next(p.dtype for p in decoder.layers.parameters() if p.is_floating_point())
    return TOLERANCE.get(dtype, 1e-4)


def _refused(decoder: Decoder, gap: float) -> ValueError:
    kind = decoder.config.model_type
    return ValueError(
        f"load: packed rows must come out as rows alone do, to {_tolerance(decoder):.0e} of the largest number "
        f"(got {gap:.1e} for the text model {kind!r})"
    )
