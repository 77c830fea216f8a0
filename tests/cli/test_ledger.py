"""The ledger's commands, as a user types them: what they print, as JSON field by field, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

import fastedit
from fastedit import EditRequest
from fastedit.backbone import EditableModel
from fastedit.cli.failures import Ended
from fastedit.cli.main import app
from fastedit.data import write_jsonl
from tests.cli.commands import Done, run_all
from tests.engine.conftest import make_edits

TINY = "--model random:llava-tiny --data edits.jsonl --images ."
EDIT = f"edit {TINY} --method lora --set steps=3 --no-evaluate --ledger led"
runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ledger")
    write_jsonl(make_edits(4), path / "edits.jsonl", images=path)
    return path


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return fastedit.load("random:llava-tiny", dtype="float64")


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, Done]:
    """A day of a ledger, one command after another; each is its own process."""
    lines = [
        f"{EDIT} --limit 2 --dtype float64",
        f"{EDIT} --dtype float64 --json",
        f"{EDIT} --dtype float64",
        "log --ledger led",
        "log --ledger led --json",
        "log --ledger led --limit 2 --json",
        "log --ledger led --edits --json",
        "log --ledger led --edits",
        "show --ledger led 2",
        "show --ledger led edit-1 --json",
        "verify --ledger led",
        "verify --ledger led --json",
        "tag --ledger led first --json",
        "tag --ledger led --json",
        "undo --ledger led 2",
        "undo --ledger led 2 edit-2 --yes --json",
        "diff --ledger led first --json",
        "diff --ledger led 0 --json",
        "diff --ledger led",
        "redo --ledger led 2 3",
        "undo --ledger led 4 --json",
        "redo --ledger led 4 --json",
        "undo --ledger led 1 --later keep --json",
        "redo --ledger led edit-0",
        "redo --ledger led edit-0 --yes --json",
        "verify --ledger led --ask --json",
        "score --ledger led --json",
        "score --ledger led",
        "compact --ledger led --json",
        "export --ledger led peft adapter --json",
        "export --ledger led peft adapter --overwrite --set rank=2",
        "export --ledger led delta earlier --at first --json",
        "export --ledger led delta never --at other --json",
    ]
    return dict(zip(lines, run_all([line.split() for line in lines], folder), strict=True))


def document(done: dict[str, Done], line: str, status: int = 0) -> Any:
    assert done[line].status == status, done[line]
    return json.loads(done[line].out)


def test_edits_go_to_the_ledger_and_nowhere_else(done: dict[str, Done], folder: Path) -> None:
    first, _, third = (done[f"{EDIT}{end}"] for end in (" --limit 2 --dtype float64", " --dtype float64 --json",
                                                         " --dtype float64"))  # fmt: skip
    assert first.status == 0, first
    assert "led: a new ledger" in first.err
    assert "ledger: led, 2 new edits, 0 were there; 2 act" in first.out
    assert third.status == 0, third
    assert "led: 4 of 4 edits are there, 0 are new" in third.err
    assert "ledger: led, 0 new edits, 4 were there; 4 act" in third.out
    assert not (folder / "runs").exists()
    content = document(done, f"{EDIT} --dtype float64 --json")
    assert (content["ledger"], content["out"], content["there"], content["new"]) == ("led", None, 2, 2)
    assert [(edit["edit"], edit["id"]) for edit in content["edits"]] == [(i + 1, f"edit-{i}") for i in range(4)]
    assert content["provenance"]["run"]["mode"] == "sequential"
    assert "led: 2 of 4 edits are there, 2 are new" in done[f"{EDIT} --dtype float64 --json"].err


def test_what_acts_is_scored_once(done: dict[str, Done]) -> None:
    content = document(done, "score --ledger led --json")
    assert list(content) == ["ledger", "edits", "new", "scores"]
    assert (content["edits"], content["new"]) == (4, 4)
    assert 0 <= content["scores"]["strict"]["reliability"]["mean"] <= 1
    again = done["score --ledger led"]
    assert again.status == 0, again
    assert "4 edits, 0 scored now" in again.out
    assert "text generality" in again.out


def test_what_acts_is_scored_on_a_cluster(folder: Path) -> None:
    pytest.importorskip("ray")
    edit, score = run_all(
        [
            [*EDIT.replace("--ledger led", "--ledger clustered").split(), "--limit", "2"],
            ["score", "--ledger", "clustered", "--engine", "ray", "--workers", "1", "--json"],
        ],
        folder,
    )
    assert edit.status == 0, edit
    content = json.loads(score.out)
    assert (content["edits"], content["new"]) == (2, 2)
    assert 0 <= content["scores"]["strict"]["reliability"]["mean"] <= 1


def test_the_log_has_every_event_and_every_edit(done: dict[str, Done]) -> None:
    content = document(done, "log --ledger led --json")
    assert list(content) == ["ledger", "model", "acting", "events"]
    assert (content["ledger"], content["model"], content["acting"]) == ("led", "random:llava-tiny", 4)
    assert [event["action"] for event in content["events"]] == ["ask", "edit", "edit", "ask", "edit", "edit"]
    assert [event["id"] for event in content["events"]] == [1, 2, 3, 4, 5, 6]
    assert content["events"][1]["detail"]["edits"] == [1]
    assert list(content["events"][0]) == ["id", "time", "action", "detail"]
    newest = document(done, "log --ledger led --limit 2 --json")
    assert newest["events"] == content["events"][-2:]
    edits = document(done, "log --ledger led --edits --json")["edits"]
    assert [(each["id"], each["name"], each["status"]) for each in edits] == [
        (i + 1, f"edit-{i}", "acts") for i in range(4)
    ]
    assert "scores" not in edits[0]
    assert "4 edits act, of random:llava-tiny" in done["log --ledger led"].out
    assert "What is number 3 here?" in done["log --ledger led --edits"].out


def test_an_edit_is_shown_by_number_and_by_name(done: dict[str, Done]) -> None:
    text = done["show --ledger led 2"].out
    assert "edit     2, edit-1\nprompt   What is number 1 here?\ntarget   seven red\nstatus   acts" in text
    content = document(done, "show --ledger led edit-1 --json")
    assert (content["id"], content["name"], content["target"]) == (2, "edit-1", "seven red")
    assert (content["method"], content["mode"], content["status"]) == ("lora", "sequential", "acts")
    assert (content["since"], content["until"], content["versions"]) == (3, None, 1)
    assert content["outcome"]["steps"] == 3
    assert content["request"]["rephrase"] == "Number 1 is what?"
    assert content["scores"] == {}


def test_a_sound_ledger_is_verified(done: dict[str, Done]) -> None:
    assert done["verify --ledger led"].status == 0
    assert done["verify --ledger led"].out.endswith("files and 4 edits that act: sound\n")
    content = document(done, "verify --ledger led --json")
    assert (content["sound"], content["problems"], content["asked"], content["lost"]) == (True, [], None, [])
    asked = document(done, "verify --ledger led --ask --json", 1)
    assert (asked["sound"], asked["asked"]) == (True, 4)
    assert list(asked["lost"][0]) == ["edit", "name", "prompt", "target", "answer"]


def test_undo_says_what_it_costs_and_asks(done: dict[str, Done]) -> None:
    refused = done["undo --ledger led 2"]
    assert refused.status == 2
    assert "to take back: 2 (What is number 1 here? -> seven red)" in refused.err
    assert "fitted on top and fitted again: 2 edits, which took 6 steps" in refused.err
    assert "fastedit: --yes: edits are fitted again where that was agreed to" in refused.err
    assert "random:llava-tiny" not in refused.err, "the model was loaded first"
    content = document(done, "undo --ledger led 2 edit-2 --yes --json")
    assert (content["ids"], content["refitted"], content["kept"], content["lost"]) == ([2, 3], [4], [], [])
    assert content["event"] == 8
    # Nothing was fitted on top of the last one: no model, nothing to agree to
    last = document(done, "undo --ledger led 4 --json")
    assert (last["ids"], last["refitted"]) == ([4], [])
    assert "random:llava-tiny" not in done["undo --ledger led 4 --json"].err
    kept = document(done, "undo --ledger led 1 --later keep --json")
    assert (kept["ids"], kept["kept"]) == ([1], [2, 3, 4])
    assert {each["edit"] for each in kept["lost"]} <= {2, 3, 4}


def test_redo_brings_back_what_was_there(done: dict[str, Done]) -> None:
    again = done["redo --ledger led 2 3"]
    assert again.status == 0, again
    assert "as they were" in again.err
    assert "acting again: 2 edits (event 9)" in again.out
    assert document(done, "redo --ledger led 4 --json")["refitted"] == []
    # Since edits behind it are other versions now, the first one is as it was only as a whole
    assert done["redo --ledger led edit-0"].status == 0, done["redo --ledger led edit-0"]
    assert done["redo --ledger led edit-0 --yes --json"].status == 2
    assert "is 'acts'" in done["redo --ledger led edit-0 --yes --json"].err


def test_what_changed_between_two_moments(done: dict[str, Done]) -> None:
    content = document(done, "diff --ledger led first --json")
    assert (content["before"], content["after"]) == ("first", None)
    for line in ("diff --ledger led first --json", "diff --ledger led 0 --json"):
        for change in document(done, line)["changes"]:
            assert list(change) == ["edit", "prompt", "images", "before", "after"]
            assert change["before"] != change["after"]
            assert Path(change["images"][0]).parts[:2] == ("led", "images")
    assert document(done, "diff --ledger led 0 --json")["changes"]
    plain = done["diff --ledger led"]
    assert plain.status == 0
    assert "base model" in plain.out
    assert "now" in plain.out


def test_states_have_names(done: dict[str, Done]) -> None:
    assert document(done, "tag --ledger led first --json") == {
        "ledger": "led", "name": "first", "event": 7, "acting": 4,
    }  # fmt: skip
    assert document(done, "tag --ledger led --json") == {"ledger": "led", "tags": {"first": 7}}


def test_few_files_are_left(done: dict[str, Done]) -> None:
    content = document(done, "compact --ledger led --json")
    assert list(content) == ["ledger", "segments", "bytes", "removed"]
    assert content["segments"]["after"] == 1
    assert content["segments"]["before"] > 1


def test_edits_leave_as_an_adapter(done: dict[str, Done], folder: Path) -> None:
    content = document(done, "export --ledger led peft adapter --json")
    assert (content["ledger"], content["kind"], content["folder"]) == ("led", "peft", "adapter")
    assert "adapter/adapter_config.json" in content["files"]
    assert content["report"]["adapters"][0]["requests"] == [f"edit-{i}" for i in range(4)]
    assert done["export --ledger led peft adapter --overwrite --set rank=2"].status == 0
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert {min(file.get_slice(name).get_shape()) for name in file.keys()} == {2}  # noqa: SIM118


def test_edits_leave_as_they_were_at_a_tag(done: dict[str, Done], folder: Path) -> None:
    content = document(done, "export --ledger led delta earlier --at first --json")
    assert (content["at"], content["folder"]) == ("first", "earlier")
    refused = done["export --ledger led delta never --at other --json"]
    assert refused.status == 2
    assert "tags are ['first']" in refused.err
    assert not (folder / "never").exists()


def run(*arguments: str) -> Any:
    result = runner.invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def kept(model: EditableModel, tmp_path: Path) -> Path:
    """A ledger of two routed edits."""
    with fastedit.open_ledger(tmp_path / "led", model) as ledger:
        ledger.edit(make_edits(2), "grace", steps=20, lr=1.0, evaluate=False, show_progress=False)
    return tmp_path / "led"


def test_answers_stand_side_by_side(kept: Path, model: EditableModel, tmp_path: Path) -> None:
    edits = make_edits(2)
    for number, edit in enumerate(edits):
        edit.image.save(tmp_path / f"{number}.png")  # type: ignore[union-attr]
    image = str(tmp_path / "0.png")
    content = run("ask", "--ledger", str(kept), "--image", image, edits[0].prompt, "--json")
    assert list(content) == ["ledger", "at", "question", "images", "base", "edited"]
    assert (content["question"], content["images"]) == (edits[0].prompt, [image])
    assert content["base"] == model.answer(edits[0].image, edits[0].prompt)
    with fastedit.open_ledger(kept, model) as ledger, ledger.state().applied() as edited:
        assert content["edited"] == edited.answer(edits[0].image, edits[0].prompt)
        both = edited.answer([edit.image for edit in edits], "Which?")  # type: ignore[arg-type]
    assert content["edited"] != content["base"]
    before = run("ask", "--ledger", str(kept), "--image", image, edits[0].prompt, "--json", "--at", "0")
    assert before["edited"] == content["base"]
    two = run(
        "ask", "--ledger", str(kept), "--image", image, "--image", str(tmp_path / "1.png"), "Which?", "--json"
    )  # fmt: skip
    assert two["edited"] == both
    none = run("ask", "--ledger", str(kept), "What is it?", "--json")
    assert (none["images"], none["base"]) == ([], model.answer(None, "What is it?"))
    shown = runner.invoke(app, ["ask", "--ledger", str(kept), "--image", image, edits[0].prompt])
    assert shown.stdout.startswith(edits[0].prompt)
    assert "base model" in shown.stdout


def test_edits_that_act_alone_answer_their_own_questions(model: EditableModel, tmp_path: Path) -> None:
    edits = make_edits(2)
    with fastedit.open_ledger(tmp_path / "led", model) as ledger:
        ledger.edit(edits, "lora", mode="single", steps=4, lr=1e-2, evaluate=False, show_progress=False)
        for number, edit in enumerate(edits):
            with fastedit.applied(model, ledger.state().deltas[number]):
                alone = model.answer(edit.image, edit.prompt)
            assert ledger.ask(edit.prompt, edit.image)[1] == alone
        base = model.answer(None, "What is it?")
        assert ledger.ask("What is it?") == (base, base)


def test_the_environment_names_the_ledger(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTEDIT_LEDGER", str(kept))
    assert run("log", "--json")["acting"] == 2
    assert run("undo", "1", "--json")["ids"] == [1]
    assert run("log", "--edits", "--json")["edits"][0]["status"] == "undone"


def refusal(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments))
    assert isinstance(result.exception, (ValueError, OSError)), result
    assert not result.stdout
    return str(result.exception)


def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_arguments: Any, **_settings: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(fastedit, "load", load)
    led = ["--ledger", str(kept)]
    assert "edits are numbered 1 to 2 (got 7)" in refusal("show", *led, "7")
    assert "a name is that of one edit" in refusal("undo", *led, "nobody")
    assert "tags are []" in refusal("diff", *led, "release")
    assert "events are numbered 1 to 3" in refusal("diff", *led, "0", "9")
    assert "tags are []" in refusal("ask", *led, "Q?", "--at", "release")
    assert "what acts again was taken back (got edit 1, which is 'acts')" in refusal("redo", *led, "1")
    assert "a tag is a text that is no number" in refusal("tag", *led, "12")
    assert "did you mean 'peft'" in refusal("export", *led, "pefd", str(tmp_path / "x"))
    assert "did you mean 'rank'" in refusal("export", *led, "peft", str(tmp_path / "x"), "--set", "rnk=2")
    assert not (tmp_path / "x").exists()
    write_jsonl([replace(make_edits(1)[0], target="green")], tmp_path / "e.jsonl", images=tmp_path)
    line = ["edit", *led, "--model", "random:llava-tiny", "--data", str(tmp_path / "e.jsonl"), "--method", "grace"]
    assert "a question has one answer" in refusal(*line, "--images", str(tmp_path))


def test_a_ledger_of_a_model_that_is_not_here_asks_for_it(
    kept: Path, monkeypatch: pytest.MonkeyPatch, model: EditableModel
) -> None:
    real = fastedit.ledger.contents.Contents.meta
    monkeypatch.setattr(
        fastedit.ledger.contents.Contents, "meta",
        lambda contents, name: "gone/model" if name == "name" else real(contents, name),
    )  # fmt: skip
    assert "--model: the ledger's model is no folder here" in refusal("ask", "--ledger", str(kept), "Q?")
    named = run("ask", "--ledger", str(kept), "Q?", "--model", "random:llava-tiny", "--json")
    assert named["base"] == model.answer(None, "Q?")


def test_another_model_and_type_are_refused(kept: Path) -> None:
    led = ["--ledger", str(kept), "--json"]
    assert "it is of the model in use" in refusal("ask", *led, "Q?", "--dtype", "float32")
    assert "questions are put as when the edits were made" in refusal("ask", *led, "Q?", "--template", "Q: {} A:")


@pytest.mark.parametrize("template", ["Q: {} A:", "Look: {image}<x> {} A:"])
def test_the_template_of_the_edits_is_taken(tmp_path: Path, template: str) -> None:
    model = fastedit.load("random:llava-tiny", template=template)
    with fastedit.open_ledger(tmp_path / "led", model) as ledger:
        ledger.edit(make_edits(1), "lora", steps=1, evaluate=False, show_progress=False)
    content = run("ask", "--ledger", str(tmp_path / "led"), "What is it?", "--json")
    assert content["base"] == model.answer(None, "What is it?")


def test_damage_is_named_and_ends_with_1(kept: Path) -> None:
    segment = next((kept / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    content[-5] ^= 1
    segment.write_bytes(content)
    result = runner.invoke(app, ["verify", "--ledger", str(kept), "--ask", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["sound"]
    assert found["problems"] == [f"segments/{segment.name}: is not what was written (its checksum differs)"]
    (kept / "ledger.sqlite").write_bytes(b"nothing of the kind" * 300)
    result = runner.invoke(app, ["verify", "--ledger", str(kept)])
    assert result.exit_code == 1
    assert "ledger.sqlite is a whole database" in result.stdout


def test_a_ledger_that_is_written_is_refused_at_once(kept: Path, tmp_path: Path) -> None:
    write_jsonl(make_edits(3), tmp_path / "edits.jsonl", images=tmp_path)
    code = (
        "import sys, time, fastedit; from pathlib import Path; from fastedit.ledger.lock import writing\n"
        f"with writing(Path({str(kept)!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    root = str(Path(__file__).resolve().parents[2])
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        lines = [
            f"edit {TINY} --method grace --ledger led --dtype float64", "undo --ledger led 1", "tag --ledger led x",
            "compact --ledger led", "log --ledger led",
        ]  # fmt: skip
        *refused, log = run_all([line.split() for line in lines], tmp_path)
    finally:
        holder.communicate("")
    for result in refused:
        assert result.status == 2
        assert f"fastedit: ledger: one process writes at a time; process {holder.pid}" in result.err
        assert len([line for line in result.err.splitlines() if line.startswith("fastedit:")]) == 1
        assert "needs" not in result.err, "the model was planned first"
    assert log.status == 0


@pytest.mark.parametrize("kind", ["peft", "merged", "delta"])
def test_edits_that_are_no_weights_do_not_leave_as_weights(kept: Path, tmp_path: Path, kind: str) -> None:
    told = refusal("export", "--ledger", str(kept), kind, str(tmp_path / "out"))
    assert f"export: {kind!r} writes changes of weights, and a delta of kind 'codebook' is none" in told
    assert not (tmp_path / "out").exists()


def test_a_question_that_is_stopped_changes_nothing(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastedit.cli.undo.is_terminal", lambda: True)
    # The end of the input is what Ctrl-C is
    result = runner.invoke(app, ["undo", "--ledger", str(kept), "1"], input="")
    assert isinstance(result.exception, Ended)
    assert (str(result.exception), result.exception.status) == ("stopped; the ledger is as it was", 130)
    with fastedit.open_ledger(kept) as ledger:
        assert len(ledger) == 2


@pytest.mark.parametrize("answer", ["n", "y"])
def test_a_terminal_is_asked(kept: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr("fastedit.cli.undo.is_terminal", lambda: True)
    result = runner.invoke(app, ["undo", "--ledger", str(kept), "1"], input=f"{answer}\n")
    assert "go on? [y/N]" in result.stderr
    with fastedit.open_ledger(kept) as ledger:
        assert len(ledger) == (2 if answer == "n" else 1)
    assert result.exit_code == (1 if answer == "n" else 0)


def test_what_needs_no_model_imports_no_transformers(kept: Path) -> None:
    lines: Sequence[Sequence[str]] = (
        ["log"], ["log", "--edits"], ["show", "1"], ["verify"], ["tag", "x"], ["compact"], ["undo", "1"], ["redo", "1"],
    )  # fmt: skip
    code = (
        "import sys; from fastedit.cli import main\n"
        f"for line in {[list(line) for line in lines]!r}:\n"
        f"    sys.argv = ['fastedit', line[0], '--ledger', {str(kept)!r}, *line[1:]]\n"
        "    try:\n        main()\n"
        "    except SystemExit as ended:\n        assert not ended.code, (line, ended.code)\n"
        "print([name for name in ('transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_narrow_ascii_terminals(kept: Path) -> None:
    lines = [f"{line} --ledger led" for line in ("log", "log --edits", "show 1", "verify", "tag")]
    done = run_all(
        [line.split() for line in lines], kept.parent,
        {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "50"},
    )  # fmt: skip
    for line, result in zip(lines, done, strict=True):
        assert result.status == 0, (line, result)
        assert result.out.isascii()
        if line.startswith("log"):
            assert max(map(len, result.out.splitlines())) <= 50


def test_a_prompt_cannot_write_to_the_terminal(model: EditableModel, tmp_path: Path) -> None:
    edit = EditRequest(prompt="Is [bold]it\x1b[31m\nred?", target="yes\u2028no")
    with fastedit.open_ledger(tmp_path / "led", model) as ledger:
        ledger.edit([edit], "grace", steps=1, evaluate=False, show_progress=False)
    for line in (["log", "--edits"], ["show", "1"]):
        out = runner.invoke(app, [line[0], "--ledger", str(tmp_path / "led"), *line[1:]]).stdout
        assert "\x1b" not in out
        assert "Is [bold]it\\x1b[31m red?" in out
