"""What was aimed at and what was reached, over all pairs of model and set that were measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from benchmarks.quality_cases import FIVE, SCORES, UNFITTED
from benchmarks.quality_outcomes import HEADINGS, Outcome, mean_of_five, named, of, pairs, score, unlabelled
from fastedit.evaluation import Score, bootstrap_over_groups

#: By pair ("set on model"), outcomes by method.
ByPair = Mapping[str, Mapping[str, Outcome]]


def over_pairs(sides: Sequence[tuple[Sequence[float | None], Sequence[float | None]]]) -> Score:
    """Mean over pairs of model and set of the paired difference, one value an edit: first minus second."""
    apart = [
        [None if a is None or b is None else a - b for a, b in zip(first, second, strict=True)]
        for first, second in sides
    ]
    return bootstrap_over_groups(apart)


def over_methods(found: Sequence[tuple[Outcome, Outcome]], name: str) -> dict[str, Score]:
    """By base method, the difference of a score over all pairs of model and set: second minus first."""
    sides: dict[str, list[tuple[list[float | None], list[float | None]]]] = {}
    for plain, other in found:
        base = plain["case"]["method"].rpartition("+")[2]
        if base not in UNFITTED and name in plain["per_edit"] and name in other["per_edit"]:
            sides.setdefault(base, []).append((other["per_edit"][name], plain["per_edit"][name]))
    return {base: over_pairs(each) for base, each in sides.items()}


def verdicts(outcomes: Sequence[Outcome]) -> list[tuple[str, bool, str]]:
    """(aim, whether it is reached on every pair, what was measured), as far as the outcomes say."""
    by_pair: dict[str, dict[str, Outcome]] = {}
    for outcome in unlabelled(of(outcomes, "single")):
        case = outcome["case"]
        by_pair.setdefault(f"{case['data']} on {case['model']}", {})[case["method"]] = outcome
    found: list[tuple[str, bool, str]] = []
    if by_pair:
        found += _best(by_pair)
        found.append(_gained(outcomes))
        found += _controlled(outcomes)
    both = {pair: known for pair, known in by_pair.items() if {"unike", "tpatcher"} <= set(known)}
    found += _each("UniKE above T-Patcher in the mean of five", both, _unike)
    hard = {pair: known for pair, known in by_pair.items() if "ldke" in known and _tells_hard(known["ldke"])}
    found += _each("LDKE-style: locality 0.98 on hard negatives, generality 0.9", hard, _hard)
    long = [o for o in of(outcomes, "sequential") if o["case"]["edits"] >= 1000]
    if long:
        best = max(long, key=lambda o: min(_value(o, name) for name in ("reliability", *FIVE[3:])))
        values = [_value(best, name) for name in ("reliability", *FIVE[3:])]
        aim = f"after {best['case']['edits']} edits in sequence reliability 0.9, locality 0.95"
        told = f"{named(best)}: {values[0]:.3f}, {values[1]:.3f}, {values[2]:.3f}"
        found.append((aim, values[0] >= 0.9 and min(values[1:]) >= 0.95, told))
    return found


def _each(
    aim: str, by_pair: ByPair, judge: Callable[[Mapping[str, Outcome]], tuple[bool, str]]
) -> list[tuple[str, bool, str]]:
    """One verdict of several pairs, reached where every one is; none without pairs."""
    judged = {pair: judge(known) for pair, known in by_pair.items()}
    if not judged:
        return []
    return [(aim, all(reached for reached, _ in judged.values()), _told({p: told for p, (_, told) in judged.items()}))]


def _told(by_pair: Mapping[str, str]) -> str:
    if len(by_pair) == 1:
        return next(iter(by_pair.values()))
    return "; ".join(f"{pair}: {told}" for pair, told in by_pair.items())


def _best(by_pair: ByPair) -> list[tuple[str, bool, str]]:
    """The method that is nearest to all bounds on the pair where it is farthest from them."""
    least = dict(zip(SCORES, (0.98, 0.95, 0.95, 0.95, 0.95, 0.9, 0.9), strict=True))

    def margin(method: str) -> float:
        return min(_value(known[method], name) - bound for known in by_pair.values() for name, bound in least.items())

    everywhere = set.intersection(*(set(known) for known in by_pair.values()))
    if not everywhere:
        return []
    # In the order of the tables where several are as near
    best = max((method for method in next(iter(by_pair.values())) if method in everywhere), key=margin)
    shown = {
        pair: ", ".join(f"{HEADINGS[name]} {_value(known[best], name):.3f}" for name in least)
        for pair, known in by_pair.items()
    }
    aim = "one method with Rel 0.98, Gen 0.95, Loc 0.95, near and same 0.9 at once, on every pair"
    return [(aim, margin(best) >= 0, f"{best}: {_told(shown)}")]


def _gained(outcomes: Sequence[Outcome]) -> tuple[str, bool, str]:
    found = pairs(outcomes)
    gained, apart = (_above(found, names) for names in (("mean_of_six",), ("mean_of_five", "near")))
    told = _counted(gained, over_methods(found, "mean_of_six"))
    if apart:
        told += f"; in the five and in near, each by itself: {', '.join(apart)}"
    aim = "odedit+x above x in the mean of the five and near, paired, over all pairs of model and set, at least 7"
    return aim, len(gained) >= 7, told


def _controlled(outcomes: Sequence[Outcome]) -> list[tuple[str, bool, str]]:
    """What the objective itself is worth, beside a control that sees the same data; none without controls."""
    apart = over_methods(pairs(outcomes, against="kl"), "mean_of_six")
    if not apart:
        return []
    above = sorted(base for base, each in apart.items() if each.low > 0)
    below = sorted(base for base, each in apart.items() if each.high < 0)
    told = f"above it {_counted(above, apart)}; below it {_counted(below, apart)}"
    aim = "odedit+x above kl+x with the same data in the mean of the five and near, over all pairs, at least half"
    return [(aim, 2 * len(above) >= len(apart), told)]


def _counted(some: Sequence[str], measured: Collection[str]) -> str:
    """How many of the methods that were measured, and which."""
    return f"{len(some)} of {len(measured)}" + (f" ({', '.join(some)})" if some else "")


def _above(found: Sequence[tuple[Outcome, Outcome]], names: Sequence[str]) -> list[str]:
    """Base methods whose second is better in each of these over all pairs, the interval above zero."""
    apart = [over_methods(found, name) for name in names]
    return sorted(base for base in apart[0] if all(base in each and each[base].low > 0 for each in apart))


def _unike(known: Mapping[str, Outcome]) -> tuple[bool, str]:
    ours, theirs = mean_of_five(known["unike"]), mean_of_five(known["tpatcher"])
    return ours > theirs, f"{ours:.3f} and {theirs:.3f}"


def _tells_hard(outcome: Outcome) -> bool:
    """Whether hard questions can be told: by edit, or as one of all."""
    return bool(outcome["per_edit"]) or _value(outcome, "image_locality") == 1.0


def _hard(known: Mapping[str, Outcome]) -> tuple[bool, str]:
    outcome = known["ldke"]
    generality = min(_value(outcome, "text_generality"), _value(outcome, "image_generality"))
    if not outcome["per_edit"]:
        told = f"1.000 on every question, the hard ones among them, generality {generality:.3f}"
        return generality >= 0.9, told
    hard = [number for number, tags in enumerate(outcome["tags"]) if "hard" in tags]
    values = [outcome["per_edit"]["image_locality"][number] for number in hard]
    present = [value for value in values if value is not None]
    locality = sum(present) / len(present) if present else float("nan")
    told = f"{locality:.3f} on {len(present)} hard questions, generality {generality:.3f}"
    return locality >= 0.98 and generality >= 0.9, told


def _value(outcome: Outcome, name: str) -> float:
    found = score(outcome, name)
    return 0.0 if found is None else float(found["mean"])
