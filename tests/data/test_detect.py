import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastedit.data import RecordErrors, detect


def test_formats_are_told_by_content(
    write: Callable[..., Path], record: Callable[..., dict], entity: Callable[..., dict]
) -> None:
    assert detect(write([record(0)])).format == "mmedit"
    assert detect(write([entity(0)])).format == "vlkeb"
    assert detect(write([record(0, port_new=[])])).format == "vlkeb"
    assert detect(write([{"prompt": "a", "target": "b"}])).format == "jsonl"
    assert detect(write([{"prompt": "a", "target": "b"}], "a.jsonl")).format == "jsonl"
    # A few broken records do not change what the file is.
    assert detect(write([record(0), 5, {"src": "x"}, {"prompt": "y"}])).format == "mmedit"


@pytest.mark.parametrize("value", [[1, 2], [{}], [{"question": "a", "answer": "b"}], [[]]])
def test_an_unknown_schema_is_refused(write: Callable[..., Path], value: object) -> None:
    with pytest.raises(RecordErrors, match="must have the fields of a format"):
        detect(write(value))


def test_releases_are_told_by_the_text_locality_questions(
    write: Callable[..., Path], record: Callable[..., dict]
) -> None:
    new = [record(i) for i in range(40)]
    old = [record(i, loc=f"nq question: {i % 2}") for i in range(40)]
    mixed = [record(i, loc=f"nq question: {i % 10}") for i in range(40)]
    assert detect(write(new)).release == "new"
    assert detect(write(old)).release == "old"
    assert detect(write(old[7:14])).release == "old"
    assert detect(write(mixed)).release is None
    assert detect(write(old)).text_locality_questions == 2


def test_too_few_or_foreign_records_tell_no_release(
    write: Callable[..., Path], record: Callable[..., dict], entity: Callable[..., dict]
) -> None:
    assert detect(write([record(i) for i in range(4)])).release is None
    assert detect(write([record(i, loc=f"who wrote {i}") for i in range(40)])).release is None
    assert detect(write([record(i, image=f"{i}.png") for i in range(40)])).release is None
    assert detect(write([entity(i) for i in range(40)])).release is None


def test_the_fingerprint_is_of_the_content(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    records = [record(i) for i in range(3)]
    first = detect(write(records))
    shuffled = [dict(reversed(list(r.items()))) for r in records]
    assert detect(write(json.dumps(shuffled, indent=3).encode())).fingerprint == first.fingerprint
    assert detect(write(records, "a.jsonl")).fingerprint == first.fingerprint
    assert detect(write(records[::-1])).fingerprint != first.fingerprint
    assert detect(write([*records[:2], record(2, alt="x")])).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mmedit/vqa_eval.json", "mmedit, E-VQA eval, new release, 2093 records, sha256 15caa1f5da02388a"),
        ("mmedit/vqa_train.json", "mmedit, E-VQA train, new release, 6345 records, sha256 da27915300eb0636"),
        ("mmedit/caption_eval_edit.json", "mmedit, E-IC eval, new release, 1000 records, sha256 427e2f959c570373"),
        ("mmedit/caption_train_edit.json", "mmedit, E-IC train, new release, 2849 records, sha256 a3312f49d06c9532"),
        (
            "mmedit/old_release/caption_eval_edit.json",
            "mmedit, E-IC eval, old release, 1000 records, sha256 e091fa5153e8f6e1",
        ),
        ("vlkeb/eval.json", "vlkeb, VLKEB eval, 3174 records, sha256 ca1b8647c216419f"),
        ("vlkeb/eval_edit_onehop.json", "vlkeb, VLKEB eval, one-hop edits, 1278 records, sha256 2d0b46ede64fb89e"),
    ],
)
def test_the_public_files_are_recognised(shared: Path, name: str, text: str) -> None:
    assert str(detect(shared / name)) == text


@pytest.mark.parametrize(
    ("name", "release"), [("caption_eval_edit.json", "new"), ("old_release/caption_eval_edit.json", "old")]
)
def test_changed_parts_of_the_public_files_are_recognised(
    shared: Path, write: Callable[..., Path], name: str, release: str
) -> None:
    records = json.loads((shared / "mmedit" / name).read_text(encoding="utf-8"))
    records[0]["alt"] = "corrected"
    for part in (records, records[:50], records[500:505], records[::7]):
        found = detect(write(part))
        assert (found.name, found.release) == (None, release)
