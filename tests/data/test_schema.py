import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastedit.data import jsonl, mmedit
from fastedit.data.fields import Fields
from fastedit.data.files import JsonObject, RawRecord, parse_json
from fastedit.data.problems import Collector, ImageError, Problem
from fastedit.data.schema import Schema, read_request, write_request, write_text
from fastedit.requests import EditRequest, Probe, Query


def read(record: dict, schema: Schema = mmedit.SCHEMA) -> tuple[EditRequest | None, list[Problem]]:
    value, _ = parse_json(json.dumps(record))
    assert isinstance(value, JsonObject)
    collector = Collector("a.json")
    fields = Fields(RawRecord(7, None, value), value, collector, strict=schema.strict)
    return read_request(fields, schema, "a.json"), collector.problems


def test_white_space_around_answers_is_removed_and_prompts_stay(record: Callable[..., dict]) -> None:
    edit, problems = read(record(alt="A man.\n", loc_ans=" x ", m_loc_a="y\t", src="a photo of ", pred=" no "))
    assert not problems
    assert edit is not None
    assert (edit.target, edit.locality_answer, edit.image_locality_answer) == ("A man.", "x", "y")
    assert (edit.prompt, edit.prediction) == ("a photo of ", "no")


def test_line_breaks_inside_a_text_stay(record: Callable[..., dict]) -> None:
    edit, _ = read(record(rephrase='"A?"\n\nRewritten:\n"B?"'))
    assert edit is not None
    assert edit.rephrase == '"A?"\n\nRewritten:\n"B?"'


def test_shared_keys_are_read(record: Callable[..., dict]) -> None:
    edit, problems = read(
        record(
            portability=[
                {"prompt": "p", "image": "a.png", "answer": "x ", "kind": "2-hop"},
                {"prompt": "q", "image": None},
            ],
            probes=[
                {"kind": "near", "prompt": "p", "image": "b.png", "answer": "y"},
                {"kind": "blind", "prompt": "p", "image": None, "answer": None},
                {"kind": "same", "prompt": "q", "image": "c.png"},
            ],
            tags=["hard"],
            id="mine",
        )
    )
    assert not problems
    assert edit is not None
    assert edit.portability == (Query("p", "a.png", "x", "2-hop"), Query("q"))
    assert edit.probes == (Probe("near", "p", "b.png", "y"), Probe("blind", "p"), Probe("same", "q", "c.png"))
    assert (edit.tags, edit.id) == (("hard",), "mine")


def test_without_an_id_a_record_is_named_by_its_place(record: Callable[..., dict]) -> None:
    assert [read(record(**own))[0].id for own in ({}, {"id": ""}, {"id": None})] == ["a.json#7"] * 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "field", "rule"),
    [
        ({"loc": None}, "loc_ans", "needs 'loc', which is absent"),
        ({"m_loc": None}, "m_loc_q", "needs 'm_loc', which is absent"),
        ({"m_loc_q": None}, "m_loc", "needs 'm_loc_q', which is absent"),
        ({"image": None}, "image_rephrase", "needs 'image', which is absent"),
        ({"probes": [{"kind": "far", "prompt": "x"}]}, "probes[0].kind", "must be one of near, blind, same"),
        ({"probes": [{"kind": "near", "prompt": "x"}]}, "probes[0].image", "must be another image in a near probe"),
        ({"probes": [{"kind": "blind", "prompt": "x", "image": "y"}]}, "probes[0].image", "must be null in a blind"),
        (
            {"probes": [{"kind": "text_locality", "prompt": "x", "image": "y"}]},
            "probes[0].image",
            "must be null in a te",
        ),
        (
            {"probes": [{"kind": "blind", "prompt": "x", "wording": "odd"}]},
            "probes[0].wording",
            'must be "" or "unseen"',
        ),
        (
            {"paraphrases": [{"prompt": "x", "kind": "odd"}]},
            "paraphrases[0].kind",
            "must be one of text_generality_uns",
        ),
        ({"paraphrases": [{"prompt": "x"}]}, "paraphrases[0].kind", "must be one of text_generality_unseen"),
        ({"probes": [{"kind": "same", "image": "y"}]}, "probes[0].prompt", "must be present"),
        ({"probes": {"kind": "same"}}, "probes", "must be a list"),
        ({"portability": [{"prompt": "x", "image": "/y"}]}, "portability[0].image", "must be relative"),
        ({"portability": [{"answer": "x"}]}, "portability[0].prompt", "must be present"),
        ({"portability": ["x"]}, "portability[0]", "must be an object"),
        ({"tags": [1]}, "tags[0]", "must be text"),
        ({"id": 3}, "id", "must be text"),
    ],
)
def test_each_rule_is_reported_at_its_field(record: Callable[..., dict], changes: dict, field: str, rule: str) -> None:
    edit, problems = read(record(**changes))
    assert edit is None
    assert any(p.field == field and rule in p.rule and p.level == "error" for p in problems), problems


def test_all_problems_of_a_record_are_reported(record: Callable[..., dict]) -> None:
    _, problems = read(record(src=1, alt="", image="../x", probes=[{}], extra=1))
    assert [p.field for p in problems] == ["src", "alt", "image", "probes[0].kind", "probes[0].prompt", "extra"]


def test_unknown_keys_of_members_warn(record: Callable[..., dict]) -> None:
    edit, problems = read(record(portability=[{"prompt": "x", "anwser": "y"}]))
    assert edit is not None
    assert [(p.field, p.level) for p in problems] == [("portability[0].anwser", "warning")]
    assert "did you mean 'answer'?" in problems[0].rule


@pytest.mark.parametrize("schema", [mmedit.SCHEMA, jsonl.SCHEMA], ids=["mmedit", "jsonl"])
def test_a_request_survives_writing_and_reading(schema: Schema) -> None:
    full = EditRequest(
        "p", "t", "i.png", "r", "j.png", "l", "la", "k.png", "m", "ma",
        (Query("q", "i.png", "x", "2-hop"),), (Probe("near", "p", "n.png", "y"), Probe("blind", "p")),
        "old", "id-1", ("hard",),
    )  # fmt: skip
    for edit in (full, EditRequest("p", "t", id="id-2")):
        again, problems = read(write_request(edit, schema, None), schema)
        assert again == edit
        assert not problems


def test_strict_schemas_write_absent_parts_as_null() -> None:
    edit = EditRequest("p", "t")
    assert set(write_request(edit, mmedit.SCHEMA, None)) == set(mmedit.KEYS.values())
    assert write_request(edit, jsonl.SCHEMA, None) == {"prompt": "p", "target": "t"}


def test_images_in_memory_are_saved(tmp_path: Path) -> None:
    picture = Image.new("RGB", (2, 2), (1, 2, 3))
    edit = EditRequest("p", "t", picture, probes=(Probe("near", "p", picture),))
    record = write_request(edit, jsonl.SCHEMA, tmp_path)
    assert record["image"] == record["probes"][0]["image"]  # type: ignore[index]
    assert [path.name for path in tmp_path.iterdir()] == [record["image"]]
    with pytest.raises(ImageError, match="needs a folder"):
        write_request(edit, jsonl.SCHEMA, None)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
