"""Colours: related where methods are, told apart where not."""

from __future__ import annotations

import colorsys
from itertools import combinations

from fastedit.report import method_colours


def rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255


def lightness(colour: str) -> float:
    red, green, blue = rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_method_under_another_objective_keeps_its_hue_and_is_darker() -> None:
    for base in ("ft", "lora", "grace", "mend"):
        colours = method_colours(["wise", base, f"kl+{base}", f"odedit+{base}"])
        hues = [colorsys.rgb_to_hsv(*rgb(colours[name]))[0] for name in (base, f"kl+{base}", f"odedit+{base}")]
        assert max(hues) - min(hues) < 0.02
        assert lightness(colours[base]) > lightness(colours[f"kl+{base}"]) > lightness(colours[f"odedit+{base}"]) + 0.05


def deuteranopic(colour: str) -> tuple[float, float, float]:
    """As people without green receptors see it (Machado, Oliveira and Fernandes 2009, severity 1)."""
    red, green, blue = rgb(colour)
    return (
        0.367322 * red + 0.860646 * green - 0.227968 * blue,
        0.280085 * red + 0.672501 * green + 0.047413 * blue,
        -0.011820 * red + 0.042940 * green + 0.968881 * blue,
    )


def test_different_methods_differ_for_colour_blind_people_too() -> None:
    colours = method_colours(["ft", "lora", "grace", "mend", "wise", "ike"])
    for one, other in combinations(colours.values(), 2):
        distance = sum((a - b) ** 2 for a, b in zip(deuteranopic(one), deuteranopic(other), strict=True)) ** 0.5
        assert distance > 0.1, (one, other)


def test_a_label_of_an_unfinished_run_has_the_colour_of_its_method() -> None:
    colours = method_colours(["lora", "lora (3)"])
    assert len(set(colours.values())) == 1
