"""Make the weights of several layers at a time: on the cores of this machine, or on a Ray cluster.

A layer is one pure function of its dense weights and its spec, so all that an executor does is to
call it somewhere. Each call has one thread to itself wherever it runs, because the last bit of a
matrix product may depend on how many share it: the same bytes come out of every executor.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from upcycle.errors import UsageError
from upcycle.ir.spec import MoESpec
from upcycle.ir.weights import FFNWeights, MoEWeights
from upcycle.passes.plan.costs import layer_parameters
from upcycle.passes.transform.transform import transform
from upcycle.util.memory import free_memory

KINDS = ("threads", "ray")


@dataclass(frozen=True)
class Workers:
    """Where layers are made.

    Attributes:
        kind: ``threads`` of this process, or the ``ray`` cluster that ``RAY_ADDRESS`` names; a
            cluster on this machine is started if there is none.
        jobs: layers at a time; by default one for each core, of this machine or of the cluster,
            and no more than half of the free memory holds.
    """

    kind: str = "threads"
    jobs: int | None = None


HERE = Workers()
# Begins to make a layer somewhere.
Submit = Callable[[FFNWeights, MoESpec], Future[MoEWeights]]


def check_workers(workers: Workers) -> None:
    """Refuse what cannot be started here.

    Raises:
        UsageError: the executor is unknown or not installed, or there are no jobs.
    """
    if workers.kind not in KINDS:
        raise UsageError(f"`executor={workers.kind}`: unknown; choose from {', '.join(KINDS)}")
    if workers.jobs is not None and workers.jobs < 1:
        raise UsageError(f"`jobs={workers.jobs}`: at least one layer is made at a time")
    if workers.kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UsageError("`executor=ray`: Ray is not installed: pip install ray, or leave it out")


@contextmanager
def layer_maker(
    workers: Workers, specs: Sequence[MoESpec], read: Callable[[MoESpec], FFNWeights]
) -> Iterator[Callable[[MoESpec], MoEWeights]]:
    """Yields a function that gives the weights of a layer, and meanwhile makes the next ones.

    It is asked for each layer at most once, and best in the order of `specs`: at most as many
    layers as there are jobs are begun, that one and those after it, and what is not asked for next
    is dropped. `read` gives the dense weights of a layer; it is called in this thread.
    """
    check_workers(workers)
    executor = _threads if workers.kind == "threads" else _ray
    with executor(workers, specs) as (submit, jobs):
        begun: dict[int, Future[MoEWeights]] = {}
        place = {spec.ffn.path: i for i, spec in enumerate(specs)}

        def layer(spec: MoESpec) -> MoEWeights:
            first = place[spec.ffn.path]
            soon = range(first, min(first + jobs, len(specs)))
            for i in set(begun).difference(soon):
                del begun[i]
            for i in soon:
                if i not in begun:
                    begun[i] = submit(read(specs[i]), specs[i])
            return begun.pop(first).result()

        yield layer


def jobs_in_memory(specs: Sequence[MoESpec], cores: int) -> int:
    """How many layers at a time: one for each core, if half of the free memory holds them.

    The largest layer counts, with its dense weights and what it becomes, both in float32.
    """
    spec = max(specs, key=lambda spec: spec.ffn.num_parameters)
    needed = 4 * (spec.ffn.num_parameters + layer_parameters(spec, spec.num_experts))
    return max(1, min(cores, len(specs), free_memory() // 2 // needed))


def local_jobs(workers: Workers, specs: Sequence[MoESpec]) -> int:
    """As `jobs_in_memory`, unless the user gave a number of threads."""
    given = workers.jobs if workers.kind == "threads" else None
    return given or jobs_in_memory(specs, torch.get_num_threads())


@contextmanager
def single_threads(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, each with one thread of torch, so that `jobs` does not change a bit."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(jobs, "layer", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # a thread also sets it for those that begin later


@contextmanager
def _threads(workers: Workers, specs: Sequence[MoESpec]) -> Iterator[tuple[Submit, int]]:
    jobs = local_jobs(workers, specs)
    with single_threads(jobs) as pool:
        yield lambda ffn, spec: pool.submit(transform, ffn, spec), jobs


@contextmanager
def _ray(workers: Workers, specs: Sequence[MoESpec]) -> Iterator[tuple[Submit, int]]:
    """Tasks of one core each; a failed machine's are run again elsewhere, by Ray."""
    import ray

    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        task = ray.remote(num_cpus=1)(_with_one_thread)
        jobs = workers.jobs or jobs_in_memory(specs, cores)
        yield lambda ffn, spec: task.remote(ffn, spec).future(), jobs
    finally:
        if ours:
            ray.shutdown()


def _with_one_thread(ffn: FFNWeights, spec: MoESpec) -> MoEWeights:
    torch.set_num_threads(1)
    return transform(ffn, spec)
