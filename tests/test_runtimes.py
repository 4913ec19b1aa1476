"""Which software runs what: the traps of each runtime, and the options that require one."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from click.testing import CliRunner, Result
from torch import nn

import upcycle
from upcycle.cli.main import main
from upcycle.errors import UnsupportedError, UsageError
from upcycle.ir.spec import Plan
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.plan.plan import make_plan
from upcycle.recipe.reader import load_recipe
from upcycle.targets.destination import onnx_destination
from upcycle.targets.native import NATIVE
from upcycle.targets.runtimes import RUNTIMES, Support, matrix, refusal

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "dtype": "float32",
}
SIGMOID = {"norm_topk_prob": True, "scoring_func": "sigmoid"}
QWEN2 = {"norm_topk_prob": False, "shared_expert_intermediate_size": 32, "qkv_bias": True}
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}


@cache
def plan(name: str = "llama", *overrides: str) -> Plan:
    located = locate_in(small_models.build(name))
    return make_plan(located, load_recipe("sparse-upcycling", overrides))


def judged(runtime: str, target: str, changes: dict[str, Any], planned: Plan) -> Support:
    return RUNTIMES[runtime](target, CONFIG | changes, planned)


@pytest.mark.parametrize(
    ("runtime", "target", "changes", "field"),
    [
        # llama.cpp fixes in its graphs whether weights are divided by their sum
        ("llama.cpp", "qwen2_moe", QWEN2, None),
        ("llama.cpp", "qwen2_moe", QWEN2 | {"norm_topk_prob": True}, "router.weights"),
        ("llama.cpp", "qwen3_moe", {"norm_topk_prob": True}, None),
        ("llama.cpp", "qwen3_moe", {"norm_topk_prob": False}, "router.weights"),
        ("llama.cpp", "olmoe", {"norm_topk_prob": True}, "router.weights"),
        ("llama.cpp", "dots1", SIGMOID | {"num_key_value_heads": 4}, None),
        ("llama.cpp", "dots1", SIGMOID, "num_key_value_heads"),
        ("llama.cpp", "dots1", {"norm_topk_prob": True}, "scoring_func"),
        # and has no option for other parts of them
        (
            "llama.cpp",
            "qwen2_moe",
            QWEN2 | {"shared_expert_intermediate_size": 0},
            "experts.shared",
        ),
        ("llama.cpp", "qwen2_moe", QWEN2 | {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("llama.cpp", "qwen2_moe", QWEN2 | {"head_dim": 16}, "head_dim"),
        ("llama.cpp", "mixtral", {"head_dim": 16}, None),
        ("llama.cpp", "granitemoe", {"head_dim": 16}, "head_dim"),
        ("llama.cpp", "granitemoe", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("llama.cpp", "glm4_moe", {}, "model_type"),
        ("llama.cpp", "flex_olmo", {}, "model_type"),
        ("llama.cpp", "gpt_oss", {}, "model_type"),
        ("llama.cpp", "remote_code", {}, "model_type"),
        ("llama.cpp", "module", {}, "MODEL"),
        ("llama.cpp", "newcomer_moe", {}, "model_type"),
        (
            "llama.cpp",
            "ernie4_5_moe",
            {"moe_num_shared_experts": 1, "moe_intermediate_size": 64},
            "experts.shared",
        ),
        ("vllm", "mixtral", {"head_dim": 16} | YARN, None),
        ("vllm", "qwen2_moe", QWEN2 | {"qkv_bias": False}, "qkv_bias"),
        ("vllm", "qwen2_moe", QWEN2 | {"head_dim": 16}, "head_dim"),
        ("vllm", "qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("vllm", "granitemoeshared", {"attention_bias": True}, "attention_bias"),
        ("vllm", "granitemoe", {"head_dim": 16}, "head_dim"),
        ("vllm", "granitemoe", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("vllm", "gpt_oss", {}, "swiglu_alpha"),
        ("vllm", "switch_transformers", {}, "model_type"),
        ("vllm", "module", {}, "MODEL"),
        ("sglang", "mixtral", {"head_dim": 16}, "head_dim"),
        ("sglang", "mixtral", YARN, "rope_parameters"),
        ("sglang", "granitemoe", YARN, "rope_parameters"),
        ("sglang", "qwen2_moe", QWEN2 | YARN, None),
        ("transformers", "module", {}, "MODEL"),
        ("transformers", "gpt_oss", {}, None),
        ("onnxruntime", "mixtral", {"dtype": "float64"}, "dtype"),
        ("onnxruntime", "module", {}, None),
    ],
)
def test_the_field_that_rules_a_runtime_out(
    runtime: str, target: str, changes: dict[str, Any], field: str | None
) -> None:
    found = judged(runtime, target, changes, plan())
    assert found.field == field
    assert (found.level == "no") == (field is not None)
    if field is not None:
        assert refusal([runtime], target, CONFIG | changes, plan()) == (
            f"`runtimes={runtime}`: {field}: {found.why[0]}"
        )


@pytest.mark.parametrize(
    ("runtime", "target", "changes"),
    [
        ("llama.cpp", "qwen3_moe", {"norm_topk_prob": True}),
        ("llama.cpp", "qwen2_moe", QWEN2),
        ("sglang", "qwen2_moe", QWEN2),
    ],
)
def test_a_dense_layer_rules_out_runtimes_that_make_all_sparse(
    runtime: str, target: str, changes: dict[str, Any]
) -> None:
    partial = plan("llama", "layers.every=2")
    assert judged(runtime, target, changes, partial).field == "layers"
    assert judged("vllm", target, changes, partial).level == "yes"


def test_a_window_that_is_ignored_is_a_limit() -> None:
    found = judged("llama.cpp", "mixtral", {"sliding_window": 4096}, plan())
    assert found.level == "limits"
    assert "right for texts of up to 4096 tokens" in found.text()
    off = {"sliding_window": 4096, "use_sliding_window": False}
    assert "4096" not in judged("llama.cpp", "mixtral", off, plan()).text()


@pytest.mark.parametrize("runtime", ["vllm", "sglang"])
def test_kernels_that_compute_swiglu_only(runtime: str) -> None:
    """vLLM replaces the experts of custom code by a kernel that computes SiLU whatever it says."""
    assert judged(runtime, "remote_code", {}, plan()).level == "limits"
    assert judged(runtime, "remote_code", {}, plan("gpt2")).field == "hidden_act"


def test_every_architecture_has_an_answer() -> None:
    for target in (*NATIVE, "remote_code", "module"):
        config = CONFIG | QWEN2
        for name, support in matrix(target, config, plan()).items():
            assert support.level in ("yes", "limits", "no"), (target, name)
            assert (support.field is not None) == (support.level == "no"), (target, name)


def test_the_option_has_every_runtime() -> None:
    option = next(p for p in main.commands["plan"].params if p.name == "runtimes")
    assert list(option.to_info_dict()["type"]["choices"]) == list(RUNTIMES)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.saved("llama", tmp_path_factory.mktemp("models") / "llama")


def test_plan_prints_the_matrix(llama: Path) -> None:
    done = run("plan", llama, "--recipe", "sparse-upcycling")
    assert done.exit_code == 0, done.stderr
    assert "written as mixtral, an architecture of transformers\n" in done.stdout
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()]
    start = rows.index("runtime")
    assert rows[start + 1 : start + 6] == list(RUNTIMES)


def test_the_matrix_as_json(llama: Path) -> None:
    done = run("plan", llama, "--recipe", "split-all", "--json")
    checkpoint = json.loads(done.stdout)["checkpoint"]
    assert set(checkpoint["runtimes"]) == set(RUNTIMES)
    assert {s["level"] for s in checkpoint["runtimes"].values()} <= {"yes", "limits", "no"}


def test_a_required_runtime_is_one_that_runs_what_is_written(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    required = ("--runtime", "llama.cpp", "--runtime", "vLLM")
    options = ("--recipe", "sparse-upcycling", "--out", out, "--target", "safetensors", "-q")
    done = run("convert", llama, *options, *required)
    assert done.exit_code == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["checkpoint"]["architecture"] == "mixtral"
    assert report["checkpoint"]["runtimes"]["vllm"]["level"] == "yes"
    card = (out / "README.md").read_text()
    assert "| llama.cpp | yes" in card
    assert "onnxruntime" not in card  # no ONNX file was written


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_a_runtime_that_nothing_satisfies_is_refused_in_one_sentence(
    tmp_path: Path, command: str
) -> None:
    model = small_models.saved("gpt2", tmp_path / "gpt2")
    out = () if command == "plan" else ("--out", tmp_path / "moe")
    done = run(command, model, "--recipe", "sparse-upcycling", "--runtime", "llama.cpp", *out, "-q")
    assert done.exit_code == 4
    assert done.stderr.startswith("error: --runtime llama.cpp: model_type: it runs no code that ")
    assert "no native architecture holds a model of type gpt2" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "moe").exists()


def test_the_reason_names_what_the_near_architectures_lack(llama: Path) -> None:
    required = ("--runtime", "llama.cpp")
    done = run("plan", llama, "--recipe", "hash-layers", *required)
    assert done.exit_code == 4
    _, reason, *rest = done.stderr.removesuffix("\n").split("; ")
    assert reason.startswith("not as mixtral, granitemoe, ")
    assert "model.layers.0.mlp: its router is linear, and that of the recipe is not" in reason
    assert not rest  # one reason for all of them


def test_an_architecture_can_be_forced(llama: Path) -> None:
    def plan_of(*options: str) -> Result:
        return run("plan", llama, "--recipe", "sparse-upcycling", *options)

    assert plan_of("--architecture", "mixtral").exit_code == 0
    wrong = plan_of("--architecture", "qwen3_moe")
    assert wrong.exit_code == 4
    assert "--architecture qwen3_moe: the dense model is llama" in wrong.stderr
    unknown = plan_of("--architecture", "mixtrall")
    assert unknown.exit_code == 2
    assert "--architecture mixtrall: unknown; choose from mixtral" in unknown.stderr


def test_onnxruntime_needs_an_onnx_file(llama: Path, tmp_path: Path) -> None:
    options = ("--recipe", "sparse-upcycling", "--out", tmp_path / "o", "--target", "safetensors")
    done = run("convert", llama, *options, "--runtime", "onnxruntime")
    assert done.exit_code == 2
    assert done.stderr == (
        "error: --runtime onnxruntime: it runs the file of --target onnx; add that\n"
    )


def test_an_onnx_file_is_for_onnxruntime() -> None:
    planned = plan()
    only = planned.requiring(["onnxruntime"], None)
    assert onnx_destination(only).runtimes["onnxruntime"].level == "yes"
    assert onnx_destination(only).runtimes["vllm"].field == "MODEL"
    for runtimes, architecture in (["vllm"], None), ([], "mixtral"):
        with pytest.raises(UsageError, match="an ONNX file becomes an ONNX file"):
            onnx_destination(planned.requiring(runtimes, architecture))


def test_the_python_interface_requires_it_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    done = upcycle.convert(plain, "sparse-upcycling", (torch.randn(4, 8),))
    with pytest.raises(UnsupportedError, match="`runtimes=transformers`: MODEL: a plain module"):
        done.save(tmp_path / "moe", runtimes=["transformers"])
    with pytest.raises(UsageError, match="`runtimes=tensorrt`: unknown; choose from transformers"):
        done.save(tmp_path / "moe", runtimes=["tensorrt"])
    assert not (tmp_path / "moe").exists()


def test_llama_cpp_names_the_tokenizer_that_ernie_needs() -> None:
    support = judged("llama.cpp", "ernie4_5_moe", {}, plan())
    assert support.level == "limits"
    assert any("tokenizer.model" in why for why in support.why)


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("llama", ("onnx.profile=cuda",), True),
        ("llama", ("onnx.profile=cuda", "onnx.form=unrolled"), False),
        ("llama", (), False),
        ("gpt2", ("onnx.profile=cuda",), False),
    ],
)
def test_swiglu_on_cuda_needs_a_new_onnx_runtime(
    model: str, options: tuple[str, ...], told: bool
) -> None:
    found = judged("onnxruntime", "remote_code", {}, plan(model, *options)).text()
    assert ("on CUDA from 1.28 on" in found) is told
