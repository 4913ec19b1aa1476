"""The command line in this process."""

from click.testing import CliRunner, Result

from upcycle.cli.main import main


def run(*arguments: object, code: int | None = 0) -> Result:
    """``upcycle`` with `arguments`; it must end with `code` if that is no None."""
    ended = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert code in (None, ended.exit_code), ended.stderr
    return ended
