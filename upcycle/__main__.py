"""``python -m upcycle``, which is the command ``upcycle``."""

from upcycle.cli import main

main()
