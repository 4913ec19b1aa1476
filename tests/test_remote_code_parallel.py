"""Experts spread over two processes, by transformers' own expert parallelism."""

from pathlib import Path
from typing import Any

import pytest
import remote_models
import torch
from remote_case import without_upcycle
from safetensors.torch import save_file

from upcycle.conversion.api import convert
from upcycle.data.verification_inputs import evaluation_for
from upcycle.targets.remote_code import auto_classes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)

EVERY_LAYER = ["layers.skip_first=0", "layers.every=1", "experts.count=8", "router.top_k=4"]
CASES = {
    "bert-masked": "sparse-upcycling",  # biased experts, in the places of linear maps
    "gemma3": "sparse-upcycling",  # gated experts, in the place of a module
    "opt": "emoe",  # tied routers, which look at the experts of both processes in training
    "vit-image": "split-all",  # every expert of a token is on one process or the other
}

# Partial sums of two processes are added: K = 8 experts at most in another order.
BOUND = 8 * 12 * torch.finfo(torch.float32).eps

# Started once and forks itself; prints what process 0 found for each model.
ELSEWHERE = """
import os, socket
import torch.multiprocessing as mp
import torch.distributed as dist
from transformers.distributed import DistributedConfig

def work(rank, folder, port, out):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if not path.is_dir():
            continue
        auto = getattr(transformers, (path / "auto").read_text())
        example = load_file(path / "example.safetensors")
        expected, gradient = example.pop("expected"), example.pop("gradient")
        config = DistributedConfig(tp_size=1, fsdp_size=2, ep_size=2)
        model = auto.from_pretrained(
            path / "moe", trust_remote_code=True, distributed_config=config
        ).eval()
        names = [n for n, p in model.named_parameters() if n.endswith(".down_proj")]
        held = [model.get_parameter(n).to_local().shape[0] for n in names]
        total = [model.get_parameter(n).shape[0] for n in names]
        result = found[path.name] = {"held": held, "total": total}
        result["error"] = relative(floats(model, example), expected)
        out_ = model(**example)
        (out_.logits if "logits" in out_ else out_[0]).pow(2).mean().backward()
        mine = model.get_parameter(names[0]).grad.full_tensor()
        result["gradient"] = relative(mine.double(), gradient)
        model.save_pretrained(path / "saved")
        dist.barrier()
        routers = {n: p.clone() for n, p in model.named_buffers() if n.endswith("router.weight")}
        floats(model.train(), example)
        result["routers"] = [relative(model.get_buffer(n), p) for n, p in routers.items()]
        saved = auto.from_pretrained(path / "saved", trust_remote_code=True).eval()
        result["saved"] = relative(floats(saved, example), expected)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()

if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = Path(sys.argv[1]) / "found.json"
    pid = os.fork()
    work(0 if pid else 1, sys.argv[1], port, out)
    if pid:
        os.waitpid(pid, 0)
        print(out.read_text())
"""


def write(name: str, folder: Path) -> None:
    folder.mkdir()
    dense = remote_models.build(name)
    batch: Any = evaluation_for(dense).batches[0]
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    changes = EVERY_LAYER if CASES[name] == "emoe" else []
    done = convert(dense, CASES[name], overrides=changes, verify=False)
    done.save(folder / "moe", verify=False)
    out = done.model(**tensors)
    out.logits.pow(2).mean().backward()
    downs = [n for n, _ in done.model.named_parameters() if n.endswith(".down_proj")]
    tensors["gradient"] = done.model.get_parameter(downs[0]).grad.double()
    tensors["expected"] = out.logits.detach().double()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "example.safetensors")
    (folder / "auto").write_text(auto_classes(dense)[0])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("parallel")
    for name in CASES:
        write(name, folder / name)
    return without_upcycle(ELSEWHERE, folder)


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_half_of_the_experts(name: str, found: Any) -> None:
    assert found[name]["held"]
    assert [2 * held for held in found[name]["held"]] == found[name]["total"]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(name: str, found: Any) -> None:
    assert found[name]["error"] <= BOUND


@pytest.mark.parametrize("name", CASES)
def test_they_find_its_gradient_and_save_its_weights(name: str, found: Any) -> None:
    """On the same batch the mean over processes is the gradient of one."""
    assert found[name]["gradient"] <= 4 * BOUND
    assert found[name]["saved"] <= BOUND


def test_tied_routers_follow_the_experts_of_both_processes(found: Any) -> None:
    """They are the mean keys already, so a step of training without an optimizer keeps them."""
    assert len(found["opt"]["routers"]) == 2
    assert max(found["opt"]["routers"]) <= BOUND
