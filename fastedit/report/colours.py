"""Colours of methods: one hue a base editor, told apart by colour-blind people; a shade of it per objective."""

from __future__ import annotations

from collections.abc import Iterable

# Okabe and Ito, "Color Universal Design" (2008), without yellow, which white paper swallows
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a")
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)
# Objective to what its shade is mixed with, and how much; a method of no other objective is the lightest
_SHADES = {"": (_WHITE, 0.45), "kl": (_WHITE, 0.2), "odedit": (_BLACK, 0.2)}


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Colours by method, "#rrggbb": ``x``, ``kl+x`` and ``odedit+x`` are shades of one hue, the last the darkest.

    Args:
        methods: names, or labels that begin with one ("lora (3)").
    """
    methods = list(methods)
    bases = list(dict.fromkeys(_parts(method)[1] for method in methods))
    colours = {}
    for method in methods:
        objective, base = _parts(method)
        colours[method] = _mixed(_HUES[bases.index(base) % len(_HUES)], *_SHADES.get(objective, (_WHITE, 0.0)))
    return colours


def _parts(method: str) -> tuple[str, str]:
    objective, _, base = method.split(" ")[0].rpartition("+")
    return objective, base


def _mixed(colour: str, other: tuple[int, int, int], share: float) -> str:
    channels = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(c + share * (o - c)):02x}" for c, o in zip(channels, other, strict=True))
