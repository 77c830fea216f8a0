"""The command line itself: where commands are added, and where they write."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

import typer
from rich.console import Console

import fastedit
from fastedit.cli.failures import Commands
from fastedit.progress import planning_memory

app = typer.Typer(
    cls=Commands,
    # Its boxes leave no room for words on a narrow terminal
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= 90 else None,
    no_args_is_help=True,
    add_completion=False,
    help="Edit knowledge in multimodal LLMs.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
messages = Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        console.print(f"fastedit {fastedit.__version__}", markup=False, highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # What a command plans for is not the plan of what this process does after it
    context.with_resource(planning_memory())


def tell(text: str, **options: Any) -> None:
    """A line on standard error, as it is."""
    messages.print(text, markup=False, highlight=False, soft_wrap=True, **options)
