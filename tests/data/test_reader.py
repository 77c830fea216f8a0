import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastedit.data import MissingImageError, RecordErrors, open_image, read_edits
from fastedit.data.mmedit import KEYS
from fastedit.requests import EditRequest


def test_all_problems_of_a_file_come_at_once(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    path = write([record(0, src=""), record(1), "x", record(3, alt=4, image="/x"), record(4, extra=1)])
    with pytest.raises(RecordErrors) as caught:
        read_edits(path)
    assert [(p.index, p.field, p.level) for p in caught.value.problems] == [
        (0, "src", "error"),
        (2, "", "error"),
        (3, "alt", "error"),
        (3, "image", "error"),
        (4, "extra", "warning"),
    ]
    assert str(caught.value).splitlines() == [
        "4 problems in 3 records",
        f"  {path} record 0, src: must not be empty (got '')",
        f"  {path} record 2: must be an object (got 'x')",
        f"  {path} record 3, alt: must be text (got 4)",
        f"  {path} record 3, image: must be relative to the image root, not absolute (got '/x')",
    ]


def test_records_beyond_the_limit_are_checked_too(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    assert len(read_edits(write([record(0), record(1), record(2)]), limit=2)) == 2
    with pytest.raises(RecordErrors):
        read_edits(write([record(0), record(1, src=3)]), limit=1)


def test_ids_are_unique(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    with pytest.raises(RecordErrors, match=r"record 2, id: must be unique; record 0 has the same \(got 'a'"):
        read_edits(write([record(0, id="a"), record(1), record(2, id="a")]))


def test_paths_stay_text_without_an_image_root(write: Callable[..., Path], record: Callable[..., dict]) -> None:
    (edit,) = read_edits(write([record(0)]))
    assert isinstance(edit.image, str)


def complete(record: dict) -> list[str]:
    return [record["image"], record["image_rephrase"], record["m_loc"]]


def test_paths_are_resolved_below_the_image_root(
    write: Callable[..., Path], record: Callable[..., dict], images: Callable[..., Path]
) -> None:
    root = images(*complete(record(0)), "p.png")
    path = write([record(0, probes=[{"kind": "near", "prompt": "x", "image": "p.png"}])])
    (edit,) = read_edits(path, images=root)
    for source in (edit.image, edit.image_rephrase, edit.image_locality_image, edit.probes[0].image):
        assert isinstance(source, Path)
        assert open_image(source, record=edit.id).size == (4, 3)


def test_all_missing_images_are_listed(
    write: Callable[..., Path], record: Callable[..., dict], images: Callable[..., Path]
) -> None:
    root = images(*complete(record(0)), record(1)["image"])
    probes = [{"kind": "near", "prompt": "x", "image": "gone.png"}] * 2
    path = write([record(0), record(1), record(2, m_loc=record(1)["m_loc"], probes=probes)])
    with pytest.raises(RecordErrors, match="7 problems in 2 records, 5 image files not found") as caught:
        read_edits(path, images=root)
    assert caught.value.missing == [*complete(record(1))[1:], *complete(record(2))[:2], "gone.png"]
    assert [p.field for p in caught.value.problems] == [
        "image_rephrase", "m_loc", "image", "image_rephrase", "m_loc", "probes[0].image", "probes[1].image",
    ]  # fmt: skip


def test_records_with_missing_images_can_be_left_out(
    write: Callable[..., Path],
    record: Callable[..., dict],
    images: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = images(*complete(record(1)), *complete(record(3)), record(0)["image"])
    path = write([record(i) for i in range(4)])
    with caplog.at_level(logging.WARNING):
        edits = read_edits(path, images=root, skip_missing=True)
    assert [edit.id for edit in edits] == ["edits.json#1", "edits.json#3"]
    assert edits.skipped == ("edits.json#0", "edits.json#2")
    assert len(edits.missing) == 5
    assert "2 of 4 records left out, 5 image files not found" in caplog.text
    limited = read_edits(path, images=root, skip_missing=True, limit=1)
    assert [edit.id for edit in limited] == ["edits.json#1"]


def test_only_the_incomplete_parts_can_be_left_out(
    write: Callable[..., Path], record: Callable[..., dict], images: Callable[..., Path]
) -> None:
    root = images(record(0)["image"], record(1)["m_loc"])
    extra = {
        "portability": [
            {"prompt": "a"},
            {"prompt": "b", "image": "gone.png"},
            {"prompt": "c", "image": record(0)["image"]},
        ],
        "probes": [{"kind": "near", "prompt": "d", "image": "gone.png"}, {"kind": "blind", "prompt": "d"}],
    }
    edits = read_edits(write([record(0, **extra), record(1)]), images=root, skip_missing="parts")
    (edit,) = edits
    assert edits.skipped == ("edits.json#1",)
    assert edit.image == root.resolve() / record(0)["image"]
    assert edit.image_rephrase is edit.image_locality_image is None
    assert edit.image_locality_prompt is edit.image_locality_answer is None
    assert [query.prompt for query in edit.portability] == ["a", "c"]
    assert [probe.kind for probe in edit.probes] == ["blind"]
    assert edit.rephrase is not None


@pytest.mark.parametrize("skip", [True, "parts"])
def test_leaving_out_never_hides_a_refused_path(
    write: Callable[..., Path], record: Callable[..., dict], images: Callable[..., Path], tmp_path: Path, skip: object
) -> None:
    root = images(*complete(record(0)))
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    path = write([record(0), record(1, m_loc="link.png")])
    with pytest.raises(RecordErrors, match="record 1, m_loc: must not leave the image root by a symbolic link"):
        read_edits(path, images=root, skip_missing=skip)  # type: ignore[arg-type]


def test_missing_images_and_malformed_records_come_together(
    write: Callable[..., Path], record: Callable[..., dict], images: Callable[..., Path]
) -> None:
    with pytest.raises(RecordErrors) as caught:
        read_edits(write([record(0), record(1, src=0)]), images=images())
    assert [p.field for p in caught.value.problems] == ["image", "image_rephrase", "m_loc", "src"]


def test_the_older_release_is_announced(
    write: Callable[..., Path], record: Callable[..., dict], caplog: pytest.LogCaptureFixture
) -> None:
    edits = read_edits(write([record(i, loc=f"nq question: {i % 2}") for i in range(20)]))
    assert "older MMEdit release" in edits.warnings[0].rule
    assert "older MMEdit release" in caplog.text
    assert edits.detection is not None
    assert edits.detection.release == "old"


def test_a_named_format_is_followed_and_a_doubt_is_said(
    write: Callable[..., Path], record: Callable[..., dict], entity: Callable[..., dict]
) -> None:
    assert len(read_edits(write([entity(0)]), format="mmedit")) == 1
    assert len(read_edits(write([record(0)]), format="vlkeb")) == 1
    with pytest.raises(RecordErrors) as caught:
        read_edits(write([record(0)]), format="jsonl")
    assert caught.value.problems[0].rule == "looks like mmedit, read as jsonl"
    assert {p.field for p in caught.value.errors} == {"prompt", "target"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"format": "csv"}, r"format must be one of mmedit, vlkeb, jsonl \(got format='csv'"),
        ({"split": "test"}, "split must be one of train, eval"),
        ({"split": "train"}, "a file has no splits"),
        ({"limit": 0}, "limit must be a positive number"),
        ({"limit": True}, "limit must be a positive number"),
        ({"limit": 1.5}, "limit must be a positive number"),
        ({"skip_missing": "all"}, "skip_missing must be"),
    ],
)
def test_arguments_are_checked(
    write: Callable[..., Path], record: Callable[..., dict], arguments: dict, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        read_edits(write([record(0)]), **arguments)


def test_files_and_folders_must_exist(write: Callable[..., Path], record: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'pocket-vqa'"):
        read_edits("pocket-vq")
    with pytest.raises(
        FileNotFoundError, match="embedded sets are pocket-vqa, pocket-caption, icon-entity, icon-vqa, icon-caption"
    ):
        read_edits(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="images must be an existing folder"):
        read_edits(write([record(0)]), images=tmp_path / "none")


def test_embedded_sets_come_from_the_pocket(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    def edit_set(name: str, *, split: str, limit: int | None) -> list[EditRequest]:
        calls.append((name, split, limit))
        return [EditRequest("p", "t")]

    pocket = types.ModuleType("fastedit.pocket")
    pocket.edit_set = edit_set  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastedit.pocket", pocket)
    edits = read_edits("pocket-vqa", split="train", limit=7)
    assert calls == [("pocket-vqa", "train", 7)]
    assert (list(edits), edits.source, edits.detection) == ([EditRequest("p", "t")], "pocket-vqa", None)
    for arguments in ({"images": "."}, {"format": "jsonl"}):
        with pytest.raises(ValueError, match="takes no images and no format"):
            read_edits("pocket-vqa", **arguments)  # type: ignore[arg-type]


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    [*KEYS, *KEYS.values(), "portability", "probes", "tags", "id", "port_new", "kind", "answer", "port_type", "Q&A"]
)
near_values = (
    json_values
    | st.sampled_from(["x", "a.png", "../a", "near", "blind", "2-hop", "nq question: q", "m.0a/b.jpg", "\ud800"])
    | st.lists(st.dictionaries(keys, json_values | st.just("near"), max_size=4), max_size=2)
)
near_records = st.lists(
    st.dictionaries(keys, near_values, max_size=6).map(
        lambda own: {"src": "a", "alt": "b", "prompt": "a", "target": "b"} | own
    )
    | st.fixed_dictionaries(dict.fromkeys(KEYS.values(), near_values))
    | json_values,
    max_size=3,
)


def read_or_refuse(data: bytes, format: str | None, with_images: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        path.write_bytes(data)
        try:
            edits = read_edits(path, format=format, images=folder if with_images else None)
        except RecordErrors as error:
            # Not by name: pytest.raises would demand the error, and other errors must get through.
            refused = error
        else:
            assert all(isinstance(edit, EditRequest) for edit in edits)
            return
    assert refused.errors
    assert str(refused)


formats = st.none() | st.sampled_from(["mmedit", "vlkeb", "jsonl"])


@settings(max_examples=250, deadline=None)
@given(json_values | near_records, formats, st.booleans())
def test_any_json_is_read_or_refused(value: object, format: str | None, with_images: bool) -> None:
    read_or_refuse(json.dumps(value).encode(), format, with_images)


@settings(max_examples=150, deadline=None)
@given(near_records, formats, st.data())
def test_any_lines_are_read_or_refused(records: list, format: str | None, data: st.DataObject) -> None:
    text = "\n".join(json.dumps(record) for record in records)
    cut = data.draw(st.integers(0, len(text)))
    read_or_refuse((text[:cut] + data.draw(st.text(max_size=2)) + text[cut:]).encode("utf-8", "replace"), format, False)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), formats)
def test_any_bytes_are_read_or_refused(data: bytes, format: str | None) -> None:
    read_or_refuse(data, format, False)
    read_or_refuse(b"[{" + data, format, False)


def test_missing_images_are_also_errors_of_opening(images: Callable[..., Path]) -> None:
    with pytest.raises(MissingImageError, match=r"^x#1: image path: not found below the image root"):
        open_image("a.png", images(), record="x#1")
