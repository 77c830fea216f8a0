"""Calls of a stock model while live deltas are attached: each has the version that it, or its cache, began with."""

from __future__ import annotations

from typing import Any

from fastedit.deltas.live import LiveHolder
from fastedit.engine.attached_calls import InFlight, Method, names_of


class LiveCalls:
    """Makes a stock model's methods into those in which the deltas of a version act.

    Args:
        live: installed. everywhere: in all threads.
    """

    def __init__(self, live: LiveHolder, *, everywhere: bool) -> None:
        self.live, self.everywhere = live, everywhere
        self.flight = InFlight(live, everywhere=everywhere)

    def forward(self, stock: Method) -> Method:
        """Return the forward in which the deltas act."""
        return self._made("forward", stock)

    def generate(self, stock: Method) -> Method:
        """Return the ``generate`` in which the deltas act."""
        return self._made("generate", stock)

    def _made(self, name: str, stock: Method) -> Method:
        names, live = names_of(stock), self.live

        def call(*args: Any, edit_ids: Any = None, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            if not live.acts:
                return stock(*args, **kwargs)
            with self.flight.call() as acts:
                if not acts:
                    return stock(**given)
                with live.stock_call(given, unknown=self.everywhere) as version:
                    if version.calls is None:
                        output = stock(**given)
                    else:
                        output = version.method(name, stock)(**given, edit_ids=edit_ids)
                    live.remember(given, output, version)
                    return output

        return call
