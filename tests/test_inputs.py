"""Example inputs: what is guessed, and what is said where nothing fits."""

from typing import Any

import pytest
import torch
import transformers as hf
import zoo
from click.testing import CliRunner
from torch import nn
from zoo_facts import ARCHITECTURES

from upcycle.capture.guess_inputs import find_example
from upcycle.cli.main import main
from upcycle.data.verification_inputs import outputs_of
from upcycle.errors import CaptureError, ValueNeededError

pytestmark = pytest.mark.usefixtures("one_thread")


def branching() -> nn.Module:
    """A model whose control flow depends on what it computes."""
    return Branching()


class Branching(nn.Module):
    """Runs its second half only for a positive sum."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = zoo.mlp(8, 16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 8] -> [..., 8]."""
        out: torch.Tensor = self.mlp(x)
        return self.mlp(out) if out.sum() > 0 else out


class Latent(hf.PreTrainedModel):  # type: ignore[misc]
    """Reads something that no configuration tells of."""

    config_class = hf.BertConfig

    def __init__(self, config: hf.BertConfig) -> None:
        super().__init__(config)
        self.mlp = zoo.mlp(8, 16, 8)

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """latents [B, 3, 8], timesteps [B, 3, 1] -> [B, 3, 8]."""
        out: torch.Tensor = self.mlp(latents.view(-1, 3, 8)) * timesteps.view(-1, 3, 1)
        return out


def test_arguments_without_a_known_form_are_named() -> None:
    with pytest.raises(CaptureError) as raised:
        find_example(Latent(hf.BertConfig()))
    assert str(raised.value) == (
        "Latent: no example could be guessed for the arguments of its forward: latents, "
        "timesteps; give all its inputs with `example_inputs`, a function that returns "
        "a dict of them by name"
    )


def test_what_a_model_does_comes_before_inputs_that_it_refuses() -> None:
    with pytest.raises(ValueNeededError, match=r"`bool` at test_inputs\.py:\d+ reads a value"):
        find_example(Branching())


def test_data_dependent_control_flow_is_one_sentence_and_exit_4(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(zoo.__file__).rpartition("/")[0])
    done = CliRunner().invoke(main, ["inspect", "test_inputs:branching"])
    assert done.exit_code == 4
    lines = done.output.strip().splitlines()
    assert "Traceback" not in done.output
    assert any("`bool` at test_inputs.py:" in line for line in lines)


class Grids(Latent):
    """Fails on an optional argument where it is None, without a message that names it."""

    def forward(  # type: ignore[override]
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor | None = None
    ) -> torch.Tensor:
        """pixel_values [N, C, S, S] -> [N, 8]."""
        count = _rows(image_grid_thw)
        out: torch.Tensor = self.mlp(pixel_values.flatten()[:8].view(1, 8) * count)
        return out


def _rows(grid: Any) -> int:
    return len(grid.tolist())


def test_an_argument_on_the_line_that_fails_is_given() -> None:
    example, _ = find_example(Grids(hf.BertConfig()))
    assert list(example) == ["pixel_values", "image_grid_thw"]


@pytest.mark.parametrize("name", ["siglip2_vision", "vilt", "bros"])
def test_what_is_guessed(name: str) -> None:
    example, _ = find_example(zoo.drawn(ARCHITECTURES[name]))
    assert {key: list(value.shape) for key, value in dict(example).items()} == {
        "siglip2_vision": {
            "pixel_values": [2, 16, 192],
            "pixel_attention_mask": [2, 16],
            "spatial_shapes": [2, 2],
        },
        "vilt": {"input_ids": [2, 7], "pixel_values": [2, 3, 32, 32]},
        "bros": {"input_ids": [2, 7], "bbox": [2, 7, 4]},
    }[name]


def test_patches_in_a_row_come_with_their_grid() -> None:
    config = hf.Qwen3VLConfig().vision_config
    with torch.device("meta"):
        model = hf.AutoModel.from_config(config)
    example, program = find_example(model)
    assert {k: list(v.shape) for k, v in dict(example).items()} == {
        "hidden_states": [32, 1536],
        "grid_thw": [2, 3],
    }
    assert program.graph.nodes


def test_a_forward_that_draws_is_compared_on_the_same_draw() -> None:
    model = zoo.drawn(ARCHITECTURES["vilt"])
    example = dict(find_example(model)[0])
    example["pixel_values"] = torch.randn(2, 3, 32, 32)
    random = torch.get_rng_state()
    first, second = (outputs_of(model, example) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        drawn = [zoo_output(model, example, seed) for seed in (0, 1)]
    assert not torch.equal(*drawn)


def zoo_output(model: nn.Module, example: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out: torch.Tensor = model(**example).last_hidden_state
    return out
