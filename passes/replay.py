"""Findings in a recorded block hold for every sibling that repeats it."""

from dataclasses import replace

from upcycle.capture import Program
from upcycle.ffn import FFN, Miss, Projection


def crosses_blocks(program: Program, ffn: FFN) -> bool:
    """Whether part of the FFN, and not all of it, lies in a block that stands for others."""
    paths = [p.module for p in (*ffn.expansions, ffn.contraction)]
    return any(
        0 < sum(_inside(path, block) for path in paths) < len(paths)
        for template, siblings in program.replays.items()
        for block in (template, *siblings, *_earlier_sibling(template))
    )


def _earlier_sibling(template: str) -> list[str]:
    head, _, index = template.rpartition(".")
    return [f"{head}.{int(index) - 1}".lstrip(".")] if index.isdigit() and int(index) else []


def with_replays(program: Program, found: list[FFN]) -> tuple[FFN, ...]:
    """Add a copy of each FFN for every sibling block that repeats the one it was found in."""
    out: list[FFN] = []
    for ffn in found:
        out.append(ffn)
        for template, siblings in program.replays.items():
            if _inside(ffn.path, template):
                for path in dict.fromkeys(siblings):
                    if path != template:
                        out.append(_renamed(ffn, template, path))
    unique = {ffn.parameters: ffn for ffn in reversed(out)}
    return tuple(sorted(unique.values(), key=_running_order(program, found)))


def _running_order(program: Program, found: list[FFN]):  # type: ignore[no-untyped-def]
    order = {path: i for i, path in enumerate(program.calls)}

    def key(ffn: FFN) -> tuple[int, ...]:
        parts = ffn.contraction.module.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return tuple(order[p] for p in prefixes if p in order)

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


def with_replayed_misses(program: Program, misses: list[Miss]) -> list[Miss]:
    out = list(misses)
    for miss in misses:
        for template, siblings in program.replays.items():
            if _inside(miss.path, template):
                out += [Miss(s + miss.path[len(template) :], miss.reason) for s in siblings]
    return list(dict.fromkeys(out))


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")
