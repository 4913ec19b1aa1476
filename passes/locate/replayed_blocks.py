"""Findings in a recorded block hold for every sibling that repeats it."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TypeVar

from upcycle.capture.recorder import Program
from upcycle.ir.ffn import FFN, Miss, Projection


def crosses_blocks(program: Program, ffn: FFN) -> bool:
    """Whether the FFN reaches from one to another of blocks that were not all recorded."""
    paths = [p.module for p in (*ffn.expansions, ffn.contraction)]
    lists = {template.rpartition(".")[0] for template in program.replays}
    return any(len({_child(path, parent) for path in paths}) > 1 for parent in lists)


def _child(path: str, parent: str) -> str | None:
    """The block of the list `parent` that `path` lies in."""
    if parent and not path.startswith(f"{parent}."):
        return None
    return path[len(parent) :].lstrip(".").partition(".")[0]


def with_replays(program: Program, found: list[FFN]) -> tuple[FFN, ...]:
    """Add each FFN for every block that repeats the one it was found in; in running order."""
    if not program.replays:  # each was recorded where it runs
        return tuple(found)
    ffns = _repeated(program, found, lambda ffn: ffn.parameters, _renamed)
    return tuple(sorted(ffns, key=_running_order(program)))


def with_replayed_misses(program: Program, misses: list[Miss]) -> list[Miss]:
    """Add each miss for every block that repeats the one it was found in."""

    def renamed(miss: Miss, old: str, new: str) -> Miss:
        return replace(miss, path=new + miss.path[len(old) :])

    return _repeated(program, misses, lambda miss: miss, renamed)


Found = TypeVar("Found", FFN, Miss)


def _repeated(
    program: Program,
    found: list[Found],
    key: Callable[[Found], Hashable],
    renamed: Callable[[Found, str, str], Found],
) -> list[Found]:
    """Each of `found`, and of what repeats it, once by its `key`; copies after the original."""
    unique: dict[Hashable, Found] = {}
    todo = list(reversed(found))
    while todo:
        one = todo.pop()
        if key(one) in unique:
            continue
        unique[key(one)] = one
        copies = [
            renamed(one, template, path)
            for template, siblings in program.replays.items()
            if one.path == template or one.path.startswith(f"{template}.")
            for path in siblings
        ]
        todo += reversed(copies)
    return list(unique.values())


def _running_order(program: Program) -> Callable[[FFN], tuple[int, ...]]:
    order = {path: i for i, path in enumerate(program.calls)}
    template_of = {path: t for t, paths in program.replays.items() for path in paths if path != t}

    def position(path: str) -> int:
        """When the module ran; one within a replayed block, when its model in the template did."""
        if path in order:
            return order[path]
        parts = path.split(".")
        for n in range(len(parts) - 1, 0, -1):
            block = ".".join(parts[:n])
            if block in template_of:
                return position(template_of[block] + path[len(block) :])
        return -1

    def key(ffn: FFN) -> tuple[int, ...]:
        parts = ffn.contraction.module.split(".")
        return tuple(position(".".join(parts[: i + 1])) for i in range(len(parts)))

    return key


def _renamed(ffn: FFN, old: str, new: str) -> FFN:
    def path(name: str) -> str:
        return new + name[len(old) :]

    def projection(p: Projection) -> Projection:
        bias = path(p.bias) if p.bias else None
        return replace(p, module=path(p.module), weight=path(p.weight), bias=bias)

    return replace(
        ffn,
        path=path(ffn.path),
        expansions=tuple(projection(p) for p in ffn.expansions),
        contraction=projection(ffn.contraction),
    )
