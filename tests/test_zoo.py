"""Every architecture of the zoo: its FFNs, all of them and nothing else, can be converted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from zoo_facts import ARCHITECTURES, OTHERS, facts_of
from zoo_table import STABLE, TABLE, markdown, row, written_rows
from zoo_timm import CASES as TIMM_CASES

from upcycle.capture.guess_inputs import find_example, randomised

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
# The float32 budget of `upcycle.ir.rounding.ROUNDING`, whose derivation is there.
RELATIVE = 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_ffns_are_found_and_converted(name: str) -> None:
    case = ARCHITECTURES[name]
    facts = facts_of(name)
    assert len(facts.found) == case.ffns
    assert (facts.placement, facts.activation) == (case.placement, case.activation)
    assert case.misses in (None, facts.misses)
    weights = [name for ffn in facts.found for name in ffn.parameters]
    assert len(weights) == len(set(weights))
    assert [weight for weight in weights if OTHERS.search(weight)] == []
    written = next((cells for cells in written_rows() if cells[0] == name), [])
    assert row(name, facts)[:STABLE] == written[:STABLE], "run benchmarks/architectures.py"
    if facts.converted is None:
        return
    assert facts.error is not None
    assert facts.error < RELATIVE
    assert facts.sensitivity is not None
    assert facts.sensitivity > 1e-2  # so that a small error says something
    if case.generates:
        prompt = torch.randint(3, zoo.VOCABULARY, (1, 5), generator=torch.manual_seed(0))
        tokens = [
            model.generate(prompt, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
            for model in (facts.model, facts.converted)
        ]
        assert torch.equal(*tokens)


def test_random_inputs_keep_what_is_no_token() -> None:
    example = {
        "input_ids": torch.zeros(2, 50, dtype=torch.long),
        "bbox": torch.zeros(2, 50, 4, dtype=torch.long),
        "past_observed_mask": torch.ones(2, 9),
        "past_values": torch.zeros(2, 9),
    }
    drawn = randomised(example, vocabulary=zoo.VOCABULARY, seed=0)
    same = {name for name, tensor in example.items() if torch.equal(tensor, drawn[name])}
    assert same == {"bbox", "past_observed_mask"}


def test_a_forward_that_says_what_it_misses_gets_it() -> None:
    example, _ = find_example(zoo.drawn(ARCHITECTURES["bros"]))
    assert list(example) == ["input_ids", "bbox"]


def test_the_page_lists_exactly_the_zoo() -> None:
    assert len(ARCHITECTURES) >= 200
    names = sorted(ARCHITECTURES | TIMM_CASES)  # the page has timm, installed here or not
    assert [cells[0] for cells in written_rows()] == names
    assert TABLE.read_text() == markdown(written_rows())


def test_the_script_of_the_table_says_how_it_is_used() -> None:
    script = ROOT / "benchmarks/architectures.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--check" in done.stdout
