"""The versions that fastedit is tested with, one after the other: ``nox -s matrix``, or one of them by name.

``nox -s "matrix(torch='2.11.0', transformers='5.17.0')"``; what follows ``--`` goes to pytest, ``-- tests/engine``.
Each session builds the package for its torch in an environment of its own; a CI that tries all runs them in turn.
"""

from __future__ import annotations

import nox

nox.options.sessions = ["matrix"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"

#: Oldest and newest of torch; of transformers, with None for the newest that there is. docs/faq.md says what was tried.
#: torch 2.11.0 comes with CUDA's libraries, 2.7 GB, where an index has no build of it for the CPU.
TORCH = ("2.11.0", "2.13.0")
TRANSFORMERS = ("5.17.0", None)
BUILD = ("setuptools>=77", "wheel", "cmake>=3.26", "ninja")


@nox.session
@nox.parametrize("transformers", TRANSFORMERS)
@nox.parametrize("torch", TORCH)
def matrix(session: nox.Session, torch: str, transformers: str | None) -> None:
    """Build for a torch and run the tests."""
    session.install(f"torch=={torch}", *BUILD)
    pinned = "transformers" if transformers is None else f"transformers=={transformers}"
    package = ("--no-build-isolation", "--editable", ".[quantize,test,bench]")
    session.install(f"torch=={torch}", pinned, *package)
    session.run("python", "-m", "pytest", *(session.posargs or ["tests"]), env={"OMP_NUM_THREADS": "1"})
