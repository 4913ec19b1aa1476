"""Decoders of more families: converted, written with a cache, run beside PyTorch step by step."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numerics
import numpy as np
import pytest
import torch
import transformers
from native_case import SLICES
from torch import nn

from upcycle import convert
from upcycle.onnx.run import session
from upcycle.targets.traced.cache import cache_argument, cache_in

pytestmark = pytest.mark.usefixtures("one_thread")

t: Any = transformers
VOCABULARY, LAYERS = 60, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW: dict[str, Any] = {
    "sliding_window": 3,  # shorter than the texts
    "layer_types": ["sliding_attention", "full_attention"],
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gemma2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**SIZES, **WINDOW, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, intermediate_size=64)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**SIZES, ffn_hidden_size=64)),
    # Its positions are rounded to bfloat16, in which ONNX Runtime does not multiply.
    "falcon-alibi": lambda: t.FalconForCausalLM(
        t.FalconConfig(**SIZES, ffn_hidden_size=64, alibi=True)
    ),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**SIZES)),
    "phi": lambda: t.PhiForCausalLM(
        t.PhiConfig(**SIZES, intermediate_size=64, partial_rotary_factor=0.5)
    ),
}
BOUND = 1e-5  # of the largest logit


def written(name: str, folder: Path) -> nn.Module:
    """Two of four different slices for each token; as ``upcycle convert`` writes it."""
    torch.manual_seed(0)
    dense = MODELS[name]().eval()
    for parameter in dense.parameters():
        if parameter.dim() == 2:  # the usual 0.02 would make every layer an identity
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    router = {"method": "normal", "top_k": 2, "weights": "one", "std": 0.3}
    example = {"input_ids": tokens(2, 6)}
    done = convert(dense, numerics.make_recipe(SLICES, router), example, verify=False)
    done.save(folder, targets=("safetensors", "onnx"), verify=False)
    return done.model.eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.manual_seed(batch))


@torch.no_grad()
def both(
    model: Any, path: Path, ids: torch.Tensor, mask: torch.Tensor, cuts: list[int], *, forget: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of ONNX Runtime and of PyTorch for the tokens between each two cuts."""
    runner = session(path)
    shapes = {value.name: value.shape for value in runner.get_inputs()}
    names = [value.name for value in runner.get_outputs()]
    empty = {
        name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    assert len(empty) == 2 * LAYERS
    past, cache, found = empty, None, []
    for start, stop in pairwise(cuts):
        first = start if forget else 0
        feeds = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, first:stop]}
        if "position_ids" in shapes:
            feeds["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
        out = dict(zip(names, runner.run(None, arrays | past), strict=True))
        feeds["attention_mask"] = mask[:, :stop]
        theirs = model(**feeds, **{cache_argument(model): cache}, use_cache=True)
        cache = cache_in(theirs)
        if not forget:
            past = {name: out[name.replace("past_key_values", "present")] for name in past}
        kept = mask[:, start:stop].bool()
        found.append((torch.from_numpy(out["logits"])[kept], theirs.logits[kept]))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_and_three_more_tokens(name: str, tmp_path: Path) -> None:
    model, path = written(name, tmp_path / "out"), tmp_path / "out" / "model.onnx"
    for batch, length in ((1, 5), (3, 7)):
        ids, mask = tokens(batch, length + 3), torch.ones(batch, length + 3, dtype=torch.int64)
        if batch > 1:
            mask[0, :2] = 0  # the first text is shorter: padding on its left
        cuts = [0, length, length + 1, length + 2, length + 3]
        for step, (ours, theirs) in enumerate(both(model, path, ids, mask, cuts, forget=False)):
            assert theirs.abs().max() > 0.1
            assert (ours - theirs).abs().max() <= BOUND * theirs.abs().max(), (batch, step)
        if batch == 1:  # without its past the last step is another
            ours, theirs = both(model, path, ids, mask, cuts, forget=True)[-1]
            assert (ours - theirs).abs().max() > 1e-2 * theirs.abs().max()
