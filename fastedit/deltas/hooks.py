"""The hooks by which installed deltas act: a site's module returns its output plus its delta's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastedit.backbone.context import overridden, scoped_hooks
from fastedit.backbone.generic.context import is_walking
from fastedit.deltas.base import StackedDelta
from fastedit.deltas.rows import TokenSpans

if TYPE_CHECKING:
    from fastedit.deltas.install import RowsHolder


@contextmanager
def hooked(holder: RowsHolder, *, everywhere: bool = False) -> Iterator[None]:
    """Inside the block the holder's deltas act wherever it is installed; on leaving no hook remains.

    Args:
        everywhere: the hooks fire in all threads, and ask there whether the holder is installed.
    """
    model, stacked = holder.model, holder.stacked
    readers: dict[nn.Module, tuple[int, str]] = {}
    sites: dict[nn.Module, Any] = {}
    for index, site in enumerate(stacked.spec.sites):
        reader = stacked.reader(index)
        source = None if reader is None else (site.layer, reader)
        if source is not None:
            (read,) = model.sites([site.layer], [source[1]])
            readers[model.module(read)] = source
        sites[model.module(site)] = _hook(holder, index, source)
    inputs = {module: _keep_input(holder, source) for module, source in readers.items()}
    with ExitStack() as entered:
        entered.enter_context(scoped_hooks(inputs, before=True, everywhere=everywhere))
        entered.enter_context(scoped_hooks(sites, everywhere=everywhere))
        yield


@contextmanager
def stock_refused(holder: RowsHolder) -> Iterator[None]:
    """Inside the block a stock forward is refused where it cannot know what the deltas need to."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            refuse_stock(holder)
            return stock(*args, **kwargs)

        return forward

    with overridden(holder.model.hf, make) if needs_prompts(holder) else nullcontext():
        yield


def needs_prompts(holder: RowsHolder) -> bool:
    """Whether the deltas have to know prompts, or whose the tokens are."""
    return holder.routed or holder.stacked.spec.positions != "all"


def refuse_stock(holder: RowsHolder) -> None:
    """The stock forward knows neither prompts nor questions: such deltas act in it where a walk goes through it.

    Raises:
        ValueError: such deltas act now, and no walk runs.
    """
    if not needs_prompts(holder) or not holder.acts or is_walking():
        return
    spec = holder.stacked.spec
    way = "asks another question" if holder.rewrites_prompts else f"acts with router={spec.options.get('router')!r}, "
    way += "" if holder.rewrites_prompts else f"positions={spec.positions!r}"
    raise ValueError(
        f"installed: a delta of kind {spec.kind!r} {way}, which the stock model's forward and generate "
        "cannot do; call generate or answer of the fastedit model (got a stock forward)"
    )


def _keep_input(holder: RowsHolder, source: tuple[int, str]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        holder.seen[source] = args[0]

    return hook


def _hook(holder: RowsHolder, index: int, key: tuple[int, str] | None) -> Any:
    stacked = holder.stacked
    partly = stacked.spec.positions != "all"

    def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not holder.acts:
            return output
        source = args[0] if key is None else holder.seen[key]
        x, flat = source.reshape(-1, source.shape[-1]), output.reshape(-1, output.shape[-1])
        x, flat = x.to(holder.device), flat.to(holder.device)
        spans = holder.spans(x.shape[0])
        if spans is None and (partly or holder.router is not None):
            options = (
                f"positions={stacked.spec.positions!r}" if partly else f"router={stacked.spec.options['router']!r}"
            )
            raise ValueError(
                f"installed: a delta with {options} acts in generate, answer and edits, where the model knows which "
                "tokens are whose (got padded rows)"
            )
        if spans is not None and spans.order is not None:
            return _on_some(stacked, index, x, flat, spans).view(output.shape).to(output.device)
        change = stacked.delta(index, x, holder.rows if spans is None else spans, flat)
        if partly and spans is not None and spans.live is not None:
            change = change * spans.live[:, None]
        if change.dtype != output.dtype:
            change = change.to(output.dtype)
        # Into the fresh change: the output may be kept for later steps
        return change.add_(flat).view(output.shape).to(output.device)

    return hook


def _on_some(stacked: StackedDelta, index: int, x: Tensor, output: Tensor, spans: TokenSpans) -> Tensor:
    """Output (T, d_out) with the change of the tokens that were chosen; the others as they are."""
    assert spans.order is not None
    order = spans.order.to(x.device)
    if not len(order):
        return output
    taken = output[order]
    change = stacked.delta(index, x[order], spans, taken).to(output.dtype)
    if stacked.spec.positions != "all" and spans.live is not None:
        change = change * spans.live[:, None]
    return output.index_copy(0, order, change + taken)
