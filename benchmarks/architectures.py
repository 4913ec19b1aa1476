"""Write docs/architectures.md: what is found in every architecture of the zoo, and the error.

    python benchmarks/architectures.py
    python benchmarks/architectures.py --check
    python benchmarks/architectures.py --check timm

With --check nothing is written: the tests of the zoo compare each row with the page, but for the
last two columns, which depend on the machine. A word limits them to the architectures named so.
The zoo is in tests/zoo*.py: tiny models with random weights. Those of timm need it installed:
pip install --no-deps timm
"""

import argparse
import sys
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"


def check(word: str) -> int:
    import pytest

    return int(pytest.main([str(TESTS / "test_zoo.py"), "-q", "-k", word]))


def write() -> int:
    import torch

    sys.path.insert(0, str(TESTS))
    warnings.simplefilter("ignore")
    from zoo_facts import ARCHITECTURES, facts_of
    from zoo_table import TABLE, markdown, row
    from zoo_timm import TIMM

    if not TIMM:
        print("the page has models of timm: pip install --no-deps timm", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    TABLE.write_text(markdown([row(name, facts_of(name)) for name in sorted(ARCHITECTURES)]))
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", nargs="?", const="test", metavar="WORD", help="write nothing")
    word = parser.parse_args().check
    raise SystemExit(check(word) if word else write())


if __name__ == "__main__":
    main()
