"""What several commands have: options, and the terminal that they write to."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]


def terminal() -> Any:
    """A rich console."""
    from rich.console import Console

    # a log or a pipe has no width of its own; tables must not be cut there
    return Console() if sys.stdout.isatty() else Console(width=160)
