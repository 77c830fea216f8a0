"""What users do wrong on the command line: one sentence that names the field, an exit status, no stack of frames."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastedit.data import EMBEDDED, write_jsonl
from tests.cli.commands import Done, run_all
from tests.engine.conftest import make_edits

TINY = "--model random:llava-tiny --data edits.jsonl --images ."
# A command line and what its one sentence has to hold; {} are files of the fixture
BAD = {
    "edit --set layers=two": "lora: layers must be a whole number or a list of whole numbers (got layers='two')",
    "edit --set lr=[1]": "lora: lr must be a finite number or None (got lr=(1,))",
    "edit --set steps=1e9x": "lora: steps must be a whole number (got steps='1e9x')",
    "edit --set steps=": "lora: steps must be a whole number (got steps='')",
    "edit --set lr=NaN": "lora: lr must be a finite number or None (got lr=nan)",
    "edit --set rank=-1": "lora: rank is at least 1 (got rank=-1)",
    "edit --set rank=true": "lora: rank must be a whole number (got rank=True)",
    "edit --set rank=1 --set rank=2": "--set: a field is given once (got rank again in 'rank=2')",
    "edit --set rnk=2": "field 'rnk' is not known; did you mean 'rank'? (got rnk=2)",
    "edit --set rank": "--set: field=value (got 'rank')",
    "edit --set =3": "--set: field=value (got '=3')",
    f"edit --set rank={'[' * 5000}": "lora: rank must be a whole number (got rank='[[[",
    f"edit --set rank={'9' * 5000}": "lora: rank must be a whole number (got rank='999",
    "edit --set seed=one": "edit: seed must be a whole number (got seed='one')",
    "edit --seed 1 --set seed=2": "--set: seed is given once (got --seed 1 and seed=2)",
    "edit --set model=x": "field 'model' is not known",
    "edit --method lorra": "method: 'lorra' is not known; did you mean 'lora'? (got method='lorra')",
    "edit --method ": "method: '' is not known",
    "edit --mode both": "mode is one of ['single', 'sequential'] (got mode='both')",
    "edit --conflicts first": "conflicts is one of ['error', 'last'] (got conflicts='first')",
    "edit --views mine": "views: source is one of ['heldout', 'record'] (got views='mine')",
    "edit --batch-size 0": "--batch-size: a number of at least 1, or auto (got '0')",
    "edit --batch-size ²": "--batch-size: a number of at least 1, or auto (got '²')",
    "edit --score-at 1,x": "--score-at: numbers separated by commas (got '1,x')",
    "edit --score-at 1": "score_at belongs to mode='sequential' (got mode='single', score_at=(1,))",
    "edit --mode sequential --score-at 9": "score_at names numbers of edits, 1 to 3 (got score_at=[9])",
    "edit --mode sequential --method ike": "ike edits one question at a time and keeps no sequence",
    "edit --device cuda:77": "device",
    "edit --device gpu": "device must be one of cpu, cuda",
    "edit --dtype float7": "dtype must be one of float32",
    "edit --quantize int3": "quantize must be one of none, nf4, int8",
    "edit --template Answer:": "template must hold {} exactly once (got template='Answer:')",
    "edit --limit 0": "--limit",
    "edit --threads 0": "--threads",
    "edit --seed -1": "--seed",
    "edit --colour red": "--colour",
    "edit --data typo.json": f"--data: {', '.join(EMBEDDED)} or a file that exists (got 'typo.json')",
    "edit --data folder": "folder: must be a regular file",
    "edit --data broken.jsonl": "broken.jsonl",
    "edit --data /dev/null": "/dev/null",
    "edit --pool typo.json": f"--pool: {', '.join(EMBEDDED)} or a file that exists (got 'typo.json')",
    "edit --images nowhere": "images must be an existing folder (got images='nowhere')",
    "edit --format xml": "format must be one of mmedit, vlkeb, jsonl",
    "edit --model typo": "name_or_path must be an embedded model",
    "edit --model folder": "folder",
    "edit --model random:llava-tny": "random shape must be one of",
    "edit --artifact x.safetensors": "--artifact: lora has no trained parts (got 'x.safetensors')",
    "edit --method mend": "mend: needs a trained part",
    "edit --method mend --artifact x.safetensors": "--artifact: a file that exists, of fastedit train",
    "edit --method mend --artifact broken.jsonl": "broken.jsonl",
    "edit --method mend --artifact folder": "folder",
    "edit --out edits.jsonl": "edits.jsonl",
    "edit --out edits.jsonl/below": "edits.jsonl",
    "edit --out /proc/nowhere": "/proc/nowhere",
    "edit --ledger edits.jsonl": "edits.jsonl",
    "train --method lora": "a method with trained parts",
    "train --method mend --trainer lr=fast": "train: lr must be a finite number (got lr='fast')",
    "train --method mend --trainer stepz=1": "trainer is one of",
    "train --method mend --steps 2 --trainer steps=3": "--trainer: steps is given once (got --steps 2 and steps=3)",
    "train --method mend --out folder --set valid_records=1 --trainer batch_size=2": "folder",
    "train": "--method",
    "compare --methods ,": "--methods: at least one name (got ',')",
    "compare --methods ft,ft": "--methods: each name once (got 'ft' again in 'ft,ft')",
    "compare --methods ft,mend": "compare: mend has parts to train, and no records to train on",
    "compare --methods ft --set rank=2": "field 'rank' is not known",
    "compare --out edits.jsonl": "edits.jsonl",
    "plan --model typo": "name_or_path must be an embedded model",
    "plan --device cuda:77": "device",
    "plan --set layers=two": "layers must be a whole number",
    "plan --set layers=99": "layers is 1 to 4 on this model (got layers=99)",
    "check folder": "folder: must be a regular file",
    "check typo.json": "typo.json",
    "check broken.jsonl": "broken.jsonl",
    "check edits.jsonl --model typo": "name_or_path must be an embedded model",
    "check edits.jsonl --template Answer: --model random:llava-tiny": "template must hold {} exactly once",
    "check edits.jsonl --images nowhere": "images must be an existing folder",
    "info nobody": "info: model is one of",
    "edit --ledger new --overwrite": "--overwrite: replaces the run that --out holds (got no --out)",
    "records nothing folder": "nothing",
    "records pocket-vqa edits.jsonl": "edits.jsonl",
    "records pocket-vqa new --split test": "test",
    "export pocket-vqa new": "an embedded set is written by fastedit records pocket-vqa new (got kind='pocket-vqa')",
    "export peft new": "the folder of edits to export, or FASTEDIT_LEDGER",
    "log": "--ledger",
    "log --ledger folder": "--ledger: a folder of edits, which fastedit edit --ledger makes",
    "log --ledger edits.jsonl --limit 0": "--limit",
    "show --ledger folder 1": "--ledger: a folder of edits",
    "undo --ledger folder 1": "--ledger: a folder of edits",
    "undo --ledger folder 1 --later never": "--later: one of refit, keep (got 'never')",
    "verify --ledger typo": "(got 'typo')",
    "ask --ledger folder --image typo.png Q": "typo.png",
    "ask --ledger folder ": "Query: prompt must not be empty",
    "export --ledger folder peft new": "--ledger: a folder of edits",
    "fly": "fly",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    write_jsonl(make_edits(3), path / "edits.jsonl", images=path)
    (path / "folder").mkdir()
    (path / "broken.jsonl").write_text('{"prompt": 3}\n{"prompt"\n')
    return path


def words(line: str) -> list[str]:
    """A command line as it is typed, in the small world of the fixture where it names none."""
    name, *rest = line.split(" ")
    if name in ("edit", "compare", "train", "plan"):
        given = TINY.split() if name != "plan" else ["--model", "random:llava-tiny"]
        rest = [
            word
            for flag, value in zip(given[::2], given[1::2], strict=True)
            if flag not in rest
            for word in (flag, value)
        ] + rest
    if name == "edit" and "--method" not in rest:
        rest += ["--method", "lora"]
    return [name, *rest]


@pytest.fixture(scope="module")
def done(folder: Path) -> Mapping[str, Done]:
    return dict(zip(BAD, run_all([words(line) for line in BAD], folder), strict=True))


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:50])
def test_a_bad_command_line_is_one_sentence(line: str, done: Mapping[str, Done]) -> None:
    result = done[line]
    assert "Traceback" not in result.err, result.err
    assert result.status == 2, result
    # A box around the message folds it
    told = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", result.err))
    assert BAD[line] in told, result.err
    assert "needs" not in result.out + result.err.replace("mend: needs", ""), "the plan was made first"
