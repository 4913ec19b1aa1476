"""A model on a GPU: methods run on the host, layers are filled where the model is."""

from dataclasses import replace

import pytest
import torch
from numerics import make_recipe, random_ffn, site
from torch._subclasses.fake_tensor import FakeTensorMode

from upcycle.ir.ffn import Located
from upcycle.ir.ffn_inputs import FFNInputs
from upcycle.ir.weights import FFNWeights
from upcycle.layers.moe import MoE
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.rewrite import fill
from upcycle.passes.transform.transform import transform

ROUTE = {"top_k": 2, "weights": "softmax"}
GPU = torch.device("cuda", 0)
FFN = random_ffn("swiglu", dtype=torch.float32)


def on_gpu(ffn: FFNWeights) -> FFNWeights:
    names = ("up_MFD", "up_bias_MF", "down_OF", "down_bias_O")
    moved = {name: torch.empty_like(getattr(ffn, name), device=GPU) for name in names}
    return replace(ffn, **moved)


def test_fake_tensors_refuse_to_mix_devices() -> None:
    """What the tests below rely on, also where torch has no CUDA."""
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device=GPU) + torch.zeros(2)


def test_what_methods_get_is_on_the_host() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        ffn = on_gpu(FFN).cpu()
        x_TD = torch.zeros(4, 16, device=GPU)
        ids_T = torch.zeros(4, dtype=torch.int64, device=GPU)
        seen = FFNInputs((x_TD,), ids_T, None, torch.zeros(2, 48, device=GPU)).cpu()
    held = [ffn.up_MFD, ffn.up_bias_MF, ffn.down_OF, ffn.down_bias_O]
    held += [*seen.x, seen.id_T, seen.importance_NF]
    assert {str(tensor.device) for tensor in held} == {"cpu"}
    assert FFN.cpu() is FFN  # what was computed for it is still found
    assert seen.cpu() is seen


def test_a_layer_is_filled_where_its_model_is() -> None:
    recipe = make_recipe({"method": "contiguous", "count": 4}, {"method": "normal"} | ROUTE)
    (spec,) = make_plan(Located(ffns=(site(FFN),)), recipe).specs
    layer = MoE(spec.layer_config())
    fill(layer, transform(FFN, spec), torch.device("meta"))
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
