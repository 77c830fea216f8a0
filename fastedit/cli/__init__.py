"""The command line: ``fastedit edit``, ``compare``, ``plan``, ``check``, ``info``, ``export``."""

from fastedit.cli.main import main

__all__ = ["main"]
