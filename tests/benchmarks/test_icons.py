"""Rows of smol-llava's tables: only edits that every variant has are compared, and the search names its best layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import icons, icons_tables
from fastedit.methods import resolve
from fastedit.requests import EditRequest, Probe, Query

DATA = "icon-entity"


def row(label: str, start: int = 0, value: float = 1.0, table: str = "localization", **more: Any) -> dict[str, Any]:
    scores = {name: [value, value] for name in (*icons_tables.CHANGES, *icons_tables.STAYS)}
    seconds = {"setup": 1.0, "backward": 2.0, "evaluation": 50.0}
    return {
        "table": table, "data": DATA, "label": label, "start": start, "weights": "w", "edits": 2, "scores": scores,
        "cpu_seconds": seconds, "layers": [[3, 7], [3, 9]], **more,
    }  # fmt: skip


def test_edits_that_one_variant_lacks_are_left_out() -> None:
    rows = [row("a"), row("b"), row("a", start=2, value=0.0)]
    found = icons_tables.complete(rows, "localization")
    assert {label: [each["start"] for each in own] for label, own in found.items()} == {"a": [0], "b": [0]}
    assert icons_tables.complete([*rows[:1], row("b", start=2)], "localization") == {}


def test_a_table_has_means_and_seconds_without_evaluation() -> None:
    rows = [row("a"), row("a", start=2, value=0.0)]
    lines = list(icons_tables.markdown(rows, "localization"))
    assert lines[0].startswith("| localization | reliability |")
    assert lines[2].startswith("| a | 0.50 <sub>0.00 to 1.00</sub> |")
    assert lines[2].endswith("| 0.50 | 1.00 |")
    assert len({line.count("|") for line in lines[:3]}) == 1


def test_the_head_says_of_how_many_edits_a_score_is() -> None:
    one = row("lora", table="methods")
    one["scores"] = {name: [1.0, 1.0] for name in icons_tables.scores_of("methods")} | {
        "portability[two-hop]": [None, 1.0]
    }
    lines = list(icons_tables.markdown([one], "methods"))
    heads = [line for line in lines if line.startswith("| methods")]
    assert len(heads) == 3
    assert (
        heads[2] == "| methods | portability[entailed] | portability[one-hop] | portability[two-hop] (1) | s an edit |"
    )
    assert "(" not in heads[0] + heads[1]
    del one["scores"]["sibling"]
    assert not any("sibling" in line for line in icons_tables.markdown([one], "methods"))


def test_an_edit_without_a_score_does_not_count() -> None:
    assert icons_tables.cell([1.0, None]) == "1.00 <sub>1.00 to 1.00</sub>"
    assert icons_tables.cell([None]) == "-"


def test_the_best_layers_alone_are_the_brute_force_set() -> None:
    worths = {26: 0.9, 7: 0.2, 10: 0.8, 13: 0.8, 29: 0.8}
    singles = [row(f"layer {layer}", value=value) for layer, value in worths.items()]
    assert icons.best_three(singles) == [26, 10, 13]
    layers = {variant.label: variant.settings["layers"] for variant in icons.localization([26, 10, 13])[-2:]}
    assert layers == {"brute force": (10, 13, 26), "brute force, one layer": (26,)}


def test_what_must_change_and_what_must_stay_count_alike() -> None:
    kept = row("layer 7")
    kept["scores"] |= {name: [0.0, None] for name in icons_tables.STAYS}
    assert icons_tables.worth(kept) == pytest.approx(0.5)


def test_every_variant_resolves_and_names_candidates_alone() -> None:
    for variant in (*icons.localization(icons.CANDIDATES[:3]), *icons.alone(), *icons.methods(), *icons.controls()):
        resolve(variant.method, variant.settings)
    labels = [variant.label for variant in icons.localization((7, 10, 13))]
    assert len(set(labels)) == len(labels)


def test_the_localization_table_asks_what_it_shows() -> None:
    image = Image.new("RGB", (4, 4))
    edit = EditRequest(
        prompt="What is this?", target="dog", image=image, rephrase="Name this.",
        portability=(Query("What does it say?", None, "woof"),),
        probes=(Probe("near", "a?", image, "b"), Probe("near", "c?", image, "d", "unseen"), Probe("same", "e?", image)),
        paraphrases=(Query("name it", None, "dog", "text_generality_unseen"), Query("Please", None, "dog", "polite")),
    )  # fmt: skip
    fewer = icons.fewer_questions(edit)
    assert [probe.prompt for probe in fewer.probes] == ["a?"]
    assert [one.kind for one in fewer.paraphrases] == ["text_generality_unseen"]
    assert (fewer.portability, fewer.rephrase) == ((), edit.rephrase)


def test_the_table_of_hops_has_edits_with_two_of_them_and_asks_nothing_else() -> None:
    image = Image.new("RGB", (4, 4))
    hops = [(), (Query("What does it say?", None, "woof", "one-hop"),), (Query("Where?", None, "Asia", "two-hop"),)]
    edits = [
        EditRequest(prompt="What is this?", target="dog", image=image, portability=each, probes=(Probe("same", "e?"),))
        for each in hops
    ]
    assert [edit.portability for edit in icons.chosen(edits, "hops")] == hops[2:]
    assert icons.chosen(edits, "methods") == edits
    fewer = icons.fewer_questions(edits[2], "hops")
    assert (fewer.portability, fewer.probes) == (hops[2], ())
    assert icons.fewer_questions(edits[2], "methods") == edits[2]


def test_rows_that_are_there_are_read_and_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "icons.jsonl"
    assert icons.read(path) == []
    path.write_text(json.dumps(row("lora", table="methods")) + "\n", encoding="utf-8")
    bench = object.__new__(icons.Bench)
    bench.rows, bench.weights, bench.data = icons.read(path), "w", DATA
    assert bench.run("methods", icons.methods()[0], 0, [])["label"] == "lora"


def test_the_report_says_how_often_layers_were_chosen() -> None:
    text = icons_tables.report([row("fast localization"), row("layer 7", table="search")])
    assert "* fast localization: layer 3 2 times, layer 7 1 times, layer 9 1 times" in text
    assert "* layer 7: 1.000, 3.0 s" in text


def test_the_stored_rows_compare_the_same_edits() -> None:
    rows = icons.read(icons.STORED)
    assert {row["table"] for row in rows} >= {"search", "localization", "methods"}
    for data, table in {(row["data"], row["table"]) for row in rows if row["table"] in icons_tables.TABLES}:
        own = [row for row in rows if (row["data"], row["table"]) == (data, table)]
        compared = icons_tables.complete(own, table).values()
        # Nothing is stored that the page does not show
        assert sum(row["edits"] for row in own) == sum(row["edits"] for each in compared for row in each)


def test_sets_are_reported_apart() -> None:
    rows = [row("a"), row("a", data="icon-vqa", start=2), row("b", data="icon-vqa", start=2)]
    text = icons_tables.report(rows)
    assert "## localization, icon-entity" in text
    assert "## localization, icon-vqa" in text
    assert text.count("| b |") == 1


def test_controls_stand_beside_their_methods() -> None:
    labels = [variant.label for variant in icons.controls()]
    for name in icons.CONTROLLED:
        assert {name, f"kl+{name}", f"odedit+{name}"} <= set(labels)
