"""``python -m upcycle``, which is the command ``upcycle``."""

from upcycle.cli.main import main

main()
