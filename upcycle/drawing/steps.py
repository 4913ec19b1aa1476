"""In which calls of modules each operation ran."""

from collections.abc import Mapping, Sequence

from upcycle.capture.recorder import Call, Program

Step = tuple[str, int]  # the path of a module, and which of its calls


def steps_of(program: Program) -> list[tuple[Step, ...]]:
    """The calls around each node of the graph, the outermost first; not that of the model itself.

    In an ONNX file no call was recorded, and the paths of the nodes say it.
    """
    nodes = list(program.graph.nodes)
    spans = [
        (call.span[0], -call.span[1], len(path), (path, number))
        for path, calls in program.calls.items()
        for number, call in enumerate(calls)
        if path and call.span[1] > call.span[0]
    ]
    if not any(calls and calls[0].span[1] for calls in program.calls.values()):
        return [_by_path(str(node.meta.get("path", "")), program.calls) for node in nodes]
    steps: list[tuple[Step, ...]] = [() for _ in nodes]
    for start, stop, _, step in sorted(spans):
        for place in range(start, -stop):
            steps[place] += (step,)
    return steps


def _by_path(path: str, calls: Mapping[str, Sequence[Call]]) -> tuple[Step, ...]:
    """A step for each module on the path; a list of modules is no module, its members are."""
    parts = path.split(".") if path else []
    steps = []
    for i in range(1, len(parts) + 1):
        is_list = i < len(parts) and parts[i].isdigit() and not calls.get(".".join(parts[:i]))
        if not is_list:
            steps.append((".".join(parts[:i]), 0))
    return tuple(steps)
