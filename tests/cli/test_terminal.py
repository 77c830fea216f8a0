"""Every terminal: ASCII, narrow, dumb, or a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import fastedit
from fastedit.cli.plan import plan_table
from fastedit.cli.tables import print_scores, score_tables
from fastedit.cli.train import validation_table
from fastedit.data import write_jsonl
from fastedit.engine import Run, Timing
from fastedit.evaluation import EditScores, Score
from fastedit.evaluation.protocol import MUST_CHANGE, MUST_STAY
from fastedit.fitting.solver import FitOutcome
from fastedit.training import Artifact
from tests.cli.commands import run_all
from tests.engine.conftest import make_edits

COMMANDS = [
    "-h",
    "--version",
    *(f"{name} -h" for name in ("edit", "train", "compare", "plan", "check", "info", "records", "log", "show", "diff")),
    *(f"{name} -h" for name in ("ask", "verify", "undo", "redo", "tag", "compact", "export", "report")),
]


def a_run(method: str) -> Run:
    names = (*MUST_CHANGE, *MUST_STAY, "text_locality_top10", "image_locality_top10")
    scores = {protocol: dict.fromkeys(names, Score(1.0, 0.8, 1.0, 3)) for protocol in ("legacy", "strict")}
    deltas = fastedit.edit(
        fastedit.load("random:llava-tiny"), make_edits(1), "lora", steps=0, evaluate=False, show_progress=False
    ).deltas
    timing = Timing(12345.6, {"evaluation": 123.4, "setup": 56.7}, 50, 123456.0)
    return Run(deltas, [FitOutcome("converged", 3, 0.1, 0.1)], scores, [EditScores({}, {})], timing, {"method": method})


def printed(*shown: object, width: int = 60, encoding: str = "utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width)
    for one in shown:
        if isinstance(one, dict):
            print_scores(console, one)
        else:
            console.print(one)
    stream.flush()
    return stream.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]


def test_seen_and_unseen_wording_stand_side_by_side() -> None:
    run = a_run("lora")
    run.scores["strict"]["text_generality"] = Score(0.975, 0.9, 1.0, 3)
    run.scores["strict"]["text_generality_unseen"] = Score(0.81, 0.7, 0.9, 3)
    lines = printed({"lora": run}, width=120)
    title = lines.index("strict protocol, 1 edit: seen / unseen wording")
    assert lines[title + 2].split() == ["method", "T-Gen", "M-Gen", "T-Loc", "M-Loc", "Near", "Same"]
    assert "97.5/81.0" in lines[title + 4]
    # Not once more among the others
    assert not any("unseen" in line for line in lines[:title] if "wording" not in line)


def test_tables_fit_60_columns_and_titles_keep_their_line() -> None:
    runs = {method: a_run(method) for method in ("lora", "odedit+ft-vision")}
    lines = printed(runs)
    assert max(map(len, lines)) <= 60
    titles = [line.rstrip() for line in lines if "protocol" in line]
    assert titles[0] == "legacy protocol, 1 edit: must change"
    assert set(titles) == {
        f"{p} protocol, 1 edit: {kind}" for p in ("legacy", "strict")
        for kind in ("must change", "must stay", "seen / unseen wording")
    }  # fmt: skip
    text = "\n".join(lines)
    assert "…" not in text
    # No score is lost to the width: 5 + 8 scores by 2 protocols and 2 methods, and 6 in both wordings
    assert text.count("100.0 ±10") == 52
    assert text.count("100.0/100.0") == 24
    assert "12345.6" in text
    assert "123456" in text


def test_wide_terminals_get_one_table_of_each_kind() -> None:
    runs = {"lora": a_run("lora")}
    assert len(score_tables(runs, "strict", width=140)) == 3
    assert len(score_tables(runs, "strict", width=40)) > 3


def test_ascii_terminals_get_ascii() -> None:
    plan = fastedit.plan_memory("random:llava-tiny", batch_size=2)
    artifact = Artifact("mend", "m", {}, {}, {"validation": [{"score": 0.5, "near": 0.5, "step": 1}], "best": None})
    lines = printed(
        {"lora": a_run("lora")}, plan_table("random:llava-tiny", plan), validation_table(artifact), encoding="ascii"
    )
    text = "\n".join(lines)
    assert "100.0 +-10" in text
    assert "% +- half a 95 % interval" in text
    assert "random:llava-tiny on cpu, batch size 2" in lines
    assert max(map(len, lines)) <= 60


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records")
    write_jsonl(make_edits(2), path / "edits.jsonl", images=path)
    (path / "straße.jsonl").write_text('{"prompt": "Wo?", "target": ""}\n', encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii", "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb", "COLUMNS": "60"},
        {"PYTHONIOENCODING": "latin-1", "COLUMNS": "40"},
    ],
    ids=["ascii", "dumb", "latin-1"],
)
def test_every_command_speaks_to_every_terminal(records: Path, environment: dict[str, str]) -> None:
    commands = [line.split() for line in (*COMMANDS, "info", "check edits.jsonl --images .", "check straße.jsonl")]
    edit = "edit --model random:llava-tiny --data edits.jsonl --images . --method lora --set steps=1 --overwrite"
    done = run_all([*commands, edit.split()], records, environment)
    for command, result in zip([*commands, edit.split()], done, strict=True):
        assert "Error" not in result.err, (command, result.err)
        assert result.status == (2 if "straße.jsonl" in command else 0), (command, result)
        if "ascii" in environment.get("PYTHONIOENCODING", ""):
            assert (result.out + result.err).isascii(), command
    assert done[1].out == f"fastedit {fastedit.__version__}\n"
    assert "--ledger" in done[2].out
    assert "strict protocol, 2 edits: must change" in done[-1].out


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    code = "from fastedit.cli import main; import sys; sys.argv[1:] = ['info']; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=600) in (0, 1, 141)
