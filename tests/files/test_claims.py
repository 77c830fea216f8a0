"""Claims: one writer at a time, and none that outlives its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastedit.files import claim_file, claim_folder
from tests.files.test_tensors import umask

ROOT = Path(__file__).parents[2]
#: Claims what the first argument says of the second and waits for the end of its input.
HOLDER = """
import sys
from fastedit.files import claim_file, claim_folder
with {"folder": claim_folder, "file": claim_file}[sys.argv[1]](sys.argv[2], "test"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(kind: str, path: Path) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", HOLDER, kind, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "held\n"
    return started


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("ended_by", ["itself", "kill"])
def test_the_second_process_is_refused_until_the_first_ends(tmp_path: Path, kind: str, ended_by: str) -> None:
    claim = {"folder": claim_folder, "file": claim_file}[kind]
    path = tmp_path / "out"
    with holder(kind, path) as other:
        message = rf"test: one process writes at a time; process {other.pid} on .* has been at it since .*{kind}=.*out"
        with pytest.raises(ValueError, match=message), claim(path, "test"):
            pass
        if ended_by == "kill":
            other.send_signal(signal.SIGKILL)
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    with claim(path, "test"):
        pass
    # what was made for the claim alone is gone, also where its owner could not clean up
    assert list(tmp_path.iterdir()) == ([path] if (kind, ended_by) == ("folder", "kill") else [])


def test_who_holds_a_claim_may_claim_again_and_another_thread_may_not(tmp_path: Path) -> None:
    errors: list[str] = []

    def elsewhere() -> None:
        try:
            with claim_folder(tmp_path, "test"):
                pass
        except ValueError as error:
            errors.append(str(error))

    with claim_folder(tmp_path, "test"):
        with claim_folder(tmp_path, "test"), claim_folder(tmp_path / "." / "sub", "test") as sub:
            assert sub.is_dir()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} " in errors[0]
    elsewhere()
    assert len(errors) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_has_claimed_nothing(tmp_path: Path) -> None:
    with claim_folder(tmp_path, "test"):
        child = os.fork()
        if child == 0:
            try:
                with claim_folder(tmp_path, "test"):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_leftovers_of_killed_writers_go_with_the_claim(tmp_path: Path) -> None:
    for name in ("a.0badc0de.partial", "b.partial"):
        (tmp_path / name).write_text("")
    with claim_file(tmp_path / "a", "test"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", "b.partial"]
    with claim_folder(tmp_path, "test"):
        assert [path.name for path in tmp_path.iterdir()] == [".fastedit.lock"]


def test_places_that_cannot_be_written_to_are_named_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for claim, path, message in (
        (claim_folder, tmp_path / "file", r"test: the folder is no file \(got folder=.*file"),
        (claim_folder, tmp_path / "file" / "a" / "b", r"test: what folder lies in is no file \(got .*file=.*file"),
        (claim_file, tmp_path / "file" / "a", r"test: what file lies in is no file"),
        (claim_file, tmp_path, r"test: the file is no folder \(got file="),
        (claim_folder, "", r"test: folder is a path \(got folder=''\)"),
        (claim_folder, "a\0b", r"test: folder is a path"),
        (claim_folder, tmp_path / ("x" * 300), r"test: the place can be written to \(got folder=.*too long"),
        (claim_file, tmp_path / ("x" * 300), r"test: the place can be written to \(got file=.*too long"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message), claim(path, "test"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write to: /proc")
def test_a_folder_that_takes_no_files_is_refused() -> None:
    message = r"test: the place can be written to \(got folder='/proc/self'"
    with pytest.raises(ValueError, match=message), claim_folder("/proc/self", "test"):
        pass


def test_others_may_take_over_what_a_user_left(tmp_path: Path) -> None:
    with umask(0o027), claim_folder(tmp_path / "x", "test") as folder:
        assert folder.stat().st_mode & 0o777 == 0o750
        assert (folder / ".fastedit.lock").stat().st_mode & 0o777 == 0o640
