"""The command line: ``fastedit edit``, ``compare``, ``check``, ``info``, ``export``."""

from fastedit.cli.main import main

__all__ = ["main"]
