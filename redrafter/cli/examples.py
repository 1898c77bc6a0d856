"""`redrafter examples`: programs to begin from, and a head that ships."""

from __future__ import annotations

from collections.abc import Sequence

from redrafter.cli.args import reports_input_errors
from redrafter.cli.configs import serve


@reports_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    return serve("examples", argv)
