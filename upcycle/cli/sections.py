"""A command whose help lists its options in sections."""

from collections.abc import Mapping, Sequence
from typing import Any

import click


class SectionedCommand(click.Command):
    """A command with many options: `sections` has the names of those under each heading.

    Those that it does not name come last, under ``Options``.
    """

    def __init__(
        self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.sections = sections or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, instead of one list."""
        left = {
            str(param.name): record
            for param in self.get_params(ctx)
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx))
        }
        parts = {
            title: [left.pop(name) for name in names] for title, names in self.sections.items()
        }
        parts["Options"] = list(left.values())
        for title, records in parts.items():
            with formatter.section(title):
                formatter.write_dl(records)
