"""The README.md of a conversion: what it says, and that its code computes something."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import yaml
from command_line import run

from upcycle.ir.measured import Check, Distance, ModelDistance
from upcycle.ir.report import HubSource, Published, Report
from upcycle.models.published import MOST_BYTES, published
from upcycle.targets.card import PROMISES, model_card
from upcycle.targets.card_usage import Usage

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKS = (
    Check("logits", 1.5e-6, 1e-5, True),
    Check("layer 3 | gate", float("nan"), 1e-5, False),
)
REPORT = Report("0", "someone/tiny", "sparse-upcycling", {}, "exact", "float32", "2", checks=CHECKS)


def card(report: Report = REPORT, **changes: object) -> str:
    arguments: dict[str, Any] = {
        "name": "tiny-moe",
        "report": report,
        "notes": [],
        "numbers": {"experts per layer": "8"},
        "usage": Usage(("native",), "AutoModelForCausalLM"),
        "runtimes": {},
        "library": "transformers",
        "recipe_text": "version: 1\nseed: 0\n",
    }
    return model_card(**{**arguments, **changes})


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_it_says_what_was_measured() -> None:
    text = card(runtimes={"vLLM": "native"}, notes=["A note."])
    for part in (
        "# tiny-moe",
        PROMISES["exact"],
        "A note.",
        "| experts per layer | 8 |",
        "| logits | 1.50e-06 | 1.00e-05 | yes |",
        "| layer 3 \\| gate | nan | 1.00e-05 | **no** |",
        "| vLLM | native |",
        "```yaml\nversion: 1\nseed: 0\n```",
    ):
        assert part in text
    assert text == card(runtimes={"vLLM": "native"}, notes=["A note."])
    assert "not verified" in card(replace(REPORT, checks=()))


def test_it_begins_with_the_verdict() -> None:
    output = Distance(0.5, 0.5, 0.5, 0.7, 0.83)
    far = replace(
        REPORT,
        promise="approximate",
        end_to_end=ModelDistance("some text", {"last": output}, 0.5),
    )
    text = card(far)
    assert "**Approximate: not for use before training.** `last` is 0.830 alike" in text
    assert text.index("not for use before") < text.index("## Use")


def test_the_front_matter() -> None:
    about = Published("apache-2.0", ("en", "de"), "text-generation")
    found = front(card(replace(REPORT, published=about)))
    assert found == {
        "license": "apache-2.0",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "someone/tiny",
        "tags": ["moe", "mixture-of-experts", "upcycle"],
    }
    local = front(card(replace(REPORT, model="./some/dense/model"), usage=Usage(("onnx",))))
    assert set(local) == {"library_name", "tags"}  # nothing that is not known
    hub = replace(REPORT, model="tiny", source=HubSource("tiny", "0" * 40))
    assert front(card(hub))["base_model"] == "tiny"


def test_a_fence_in_the_recipe_does_not_end_the_block() -> None:
    assert "````yaml\n# ```\n````" in card(recipe_text="# ```")


def test_every_form_has_code_that_parses() -> None:
    forms = ("native", "remote_code", "module", "onnx", "onnx_pair")
    for has_tokenizer in (False, True):
        usage = Usage(forms, "AutoModel", has_tokenizer)
        for title, code in usage.snippets():
            assert title
            compile(code, title, "exec")
        assert ("AutoTokenizer" in usage.snippets()[0][1]) is has_tokenizer
    assert "trust_remote_code=True" in Usage(("remote_code",), "AutoModel").snippets()[0][1]


@pytest.mark.parametrize("model", ["llama", "sample:bert-tiny"])
def test_its_code_computes_something(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense: Any = model
    if model == "llama":
        size = {"num_hidden_layers": 1}  # of the code no line depends on it, and it is faster
        dense = small_models.saved("llama", tmp_path / "llama", with_tokenizer=True, **size)
        (dense / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Llama\n")
    out = tmp_path / "moe"
    run("convert", dense, "--recipe", "sparse-upcycling", "--out", out, "-q")
    text = (out / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 3  # transformers, ONNX Runtime, training
    namespace: dict[str, Any] = {}
    capsys.readouterr()
    for block in blocks:
        exec(block.replace("path/to/this/directory", str(out)), namespace)
    said = capsys.readouterr().out
    assert "input_ids" in said
    assert namespace["model"].config.output_router_logits is True
    if model == "llama":
        assert front(text)["license"] == "mit"
        assert front(text)["language"] == ["en"]
        assert front(text)["pipeline_tag"] == "text-generation"
    else:
        assert "torch.Size([1, " in said
        assert front(text)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n", Published("mit")),
        (
            "---\r\nlanguage:\r\n- en\r\n- zh-Hans\r\n- no\r\n---\r\n",
            Published(None, ("en", "zh-Hans", "no")),
        ),
        ("---\nlicense: 'mit\\n# own'\nlanguage: [EN, 3, x]\n---\n", None),
        ("---\nlicense: [mit]\npipeline_tag: <script>\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system [id]\n---\n", None),
        ("# no front matter\n", None),
        ("---\n: : :\n---\n", None),
        ("---\n" + "a: &a [x]\n" * 9 + "license: mit\n", None),
        ("---\n" + "#" * MOST_BYTES + "\nlicense: mit\n---\n", None),
    ],
)
def test_what_the_dense_card_says_is_data(
    text: str, expected: Published | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(text)
    assert published("model", tmp_path) == expected
    assert published("model", None) is None
