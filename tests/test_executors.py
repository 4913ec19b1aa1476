"""Layers made side by side, here or on a Ray cluster: the same bytes as one after the other."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import LlamaConfig, LlamaForCausalLM

from upcycle.cli.main import main
from upcycle.conversion import workers as executors
from upcycle.conversion.workers import Workers, check_workers, jobs_in_memory, layer_maker
from upcycle.errors import UpcycleError, UsageError
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, MoEWeights, read_ffn
from upcycle.passes.locate.locate import locate_in
from upcycle.passes.plan.plan import make_plan
from upcycle.passes.transform.transform import transform
from upcycle.recipe.reader import load_recipe

LAYERS = 4
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install ray")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 300}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_attention_heads=4)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def folder(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    return folder


def specs_of(model: LlamaForCausalLM, recipe: str) -> tuple[MoESpec, ...]:
    return make_plan(locate_in(model), load_recipe(recipe), recipe_name=recipe).specs


def reader(model: LlamaForCausalLM, asked: list[str]) -> Callable[[MoESpec], FFNWeights]:
    parameters = dict(model.named_parameters())

    def read(spec: MoESpec) -> FFNWeights:
        asked.append(spec.ffn.path)
        return read_ffn(spec.ffn, parameters)

    return read


def assert_equal(made: MoEWeights, expected: MoEWeights) -> None:
    for name, tensor in expected.tensors().items():
        assert torch.equal(made.tensors()[name], tensor), name
    assert torch.equal(made.provenance.expert_EI, expected.provenance.expert_EI)


def convert(model: Path, out: Path, *options: str) -> Result:
    arguments = ["convert", str(model), "--out", str(out), "--target", "safetensors", *options]
    return CliRunner().invoke(main, arguments)


HOW_VERIFIED = {"README.md", "report.html", "report.json"}


def digests(folder: Path) -> dict[str, str]:
    """Of every file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module")
def one_by_one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    result = convert(folder, out, "--recipe", "moefication", "--jobs", "1", "--stream")
    assert result.exit_code == 0, result.output
    return digests(out)


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_two_at_a_time_write_the_same_bytes(
    folder: Path, one_by_one: dict[str, str], tmp_path: Path, how: str
) -> None:
    """And measure the same of each layer, where layers are verified by themselves."""
    result = convert(folder, tmp_path / "out", "--recipe", "moefication", "--jobs", "2", how)
    assert result.exit_code == 0, result.output
    found = digests(tmp_path / "out")
    differing = {name for name in one_by_one | found if one_by_one.get(name) != found.get(name)}
    assert differing == (HOW_VERIFIED if how == "--no-stream" else set())


def test_no_more_layers_are_begun_than_there_are_jobs(llama: LlamaForCausalLM) -> None:
    specs, asked = specs_of(llama, "sparse-upcycling"), list[str]()
    read = reader(llama, asked)
    with layer_maker(Workers(jobs=2), specs, read) as layer:
        for i, spec in enumerate(specs):
            assert_equal(layer(spec), transform(read_ffn(spec.ffn, llama.state_dict()), spec))
            assert len(asked) == min(i + 2, LAYERS)
    assert asked == [spec.ffn.path for spec in specs]


def test_layers_in_another_order_are_right(llama: LlamaForCausalLM) -> None:
    specs, asked = specs_of(llama, "moefication"), list[str]()
    with layer_maker(Workers(jobs=2), specs, reader(llama, asked)) as layer:
        for spec in reversed(specs):
            assert_equal(layer(spec), transform(read_ffn(spec.ffn, llama.state_dict()), spec))


def test_the_threads_of_torch_are_as_before(llama: LlamaForCausalLM) -> None:
    specs, before = specs_of(llama, "sparse-upcycling"), torch.get_num_threads()
    with layer_maker(Workers(jobs=2), specs, reader(llama, [])) as layer:
        layer(specs[0])
    assert torch.get_num_threads() == before


def test_an_error_in_a_layer_is_raised_where_it_is_asked_for(llama: LlamaForCausalLM) -> None:
    broken = LlamaForCausalLM(llama.config)
    torch.nn.init.constant_(broken.model.layers[1].mlp.gate_proj.weight, torch.nan)
    specs = specs_of(broken, "moefication")
    with layer_maker(Workers(jobs=2), specs, reader(broken, [])) as layer:
        layer(specs[0])
        with pytest.raises(UpcycleError, match="NaN"):
            layer(specs[1])


def test_little_memory_means_one_at_a_time(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = specs_of(llama, "sparse-upcycling")
    assert jobs_in_memory(specs, cores=2) == 2
    assert jobs_in_memory(specs, cores=100) == LAYERS
    monkeypatch.setattr(executors, "free_memory", lambda: 10**6)
    assert jobs_in_memory(specs, cores=2) == 1


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (Workers("processes"), "`executor=processes`: unknown; choose from threads, ray"),
        (Workers(jobs=0), "`jobs=0`: at least one"),
    ],
)
def test_what_cannot_be_started_is_refused(workers: Workers, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_workers(workers)


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_executor_is_refused_and_says_what_to_install(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = convert(folder, out, "--recipe", "sparse-upcycling", "--executor", "ray")
    assert result.exit_code == 2
    assert "pip install ray" in result.output
    assert not out.exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two nodes of one core each, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()
    nodes.shutdown()


@needs_ray
@pytest.mark.filterwarnings("ignore")  # what Ray's own code warns of
@pytest.mark.parametrize("recipe", ["moefication", "sparse-upcycling"])
def test_a_cluster_of_two_workers_writes_the_same_bytes(
    folder: Path, cluster: None, tmp_path: Path, recipe: str
) -> None:
    import ray

    assert len(ray.nodes()) == 2
    for name, how in (("here", "threads"), ("there", "ray")):
        options = ("--recipe", recipe, "--executor", how, "--stream")
        result = convert(folder, tmp_path / name / "out", *options)
        assert result.exit_code == 0, result.output
    assert digests(tmp_path / "there/out") == digests(tmp_path / "here/out")
