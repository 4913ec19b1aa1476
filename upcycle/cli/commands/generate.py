"""``upcycle generate`` and ``upcycle steer``: decode with another routing, and find one."""

import re
from pathlib import Path
from typing import Any

import click

from upcycle.cli import console
from upcycle.cli.commands import options
from upcycle.cli.group import collector_paused


class _Expert(click.ParamType):  # type: ignore[type-arg]
    """``7:3``, or ``model.layers.7.mlp:3``."""

    name = "expert"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | str, int]:
        """A layer, by its number or path, and an expert of it."""
        layer, _, expert = str(value).rpartition(":")
        if not layer or not expert.isdecimal():
            self.fail(f"{value!r} is no LAYER:EXPERT, such as 7:3", param, ctx)
        return int(layer) if layer.isdecimal() else layer, int(expert)


def _contrast(
    ctx: click.Context, param: click.Parameter, text: str | None
) -> dict[str, Any] | None:
    """``ranks=2,beta=0.5``; several ranks as ``ranks=2+3``."""
    if text is None:
        return None
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            if name == "ranks":
                found[name] = tuple(int(rank) for rank in re.split(r"\+", value))
            elif name in ("alpha", "beta"):
                found[name] = float(value)
            else:
                raise click.BadParameter(f"{name!r}: choose from ranks, alpha, beta", ctx, param)
        except ValueError:
            raise click.BadParameter(f"{part!r} is no number", ctx, param) from None
    return found


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be repeated.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, help="Tokens to write.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Draw tokens; 0 takes the best one each time.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the draws.")
@click.option("--k", type=click.IntRange(min=1), help="Experts of a token.  [default: the model's]")
@click.option(
    *("--suppress", "suppress"),
    multiple=True,
    type=_Expert(),
    metavar="LAYER:EXPERT",
    help="An expert that adds nothing; may be repeated.",
)
@click.option(
    *("--force", "force"),
    multiple=True,
    type=_Expert(),
    metavar="LAYER:EXPERT",
    help="An expert that every token visits; may be repeated.",
)
@click.option(
    *("--steer", "steering"),
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A setting that `upcycle steer` wrote.",
)
@click.option(
    "--contrast",
    callback=_contrast,
    metavar="ranks=2,beta=0.5",
    help="Decode by the contrast with the experts of other ranks; alpha=0.1 too.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="FILE",
    help="A file of `upcycle esft`; repeated, one for each prompt, `base` for none.",
)
@options.as_json
@options.trust
@options.log
def generate(
    directory: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    k: int | None,
    suppress: tuple[tuple[int | str, int], ...],
    force: tuple[tuple[int | str, int], ...],
    steering: Path | None,
    contrast: dict[str, Any] | None,
    adapters: tuple[str, ...],
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Write text with the mixture of experts in DIRECTORY, with its routing or with another.

    \b
    Example: upcycle generate smollm2-moe --prompt "The sea is" --contrast ranks=2,beta=0.5
    """
    with collector_paused():
        from upcycle.cli.mixture import check_mixture
        from upcycle.operations.expert_adapter import ExpertAdapter
        from upcycle.operations.generate import Contrast
        from upcycle.operations.generate import generate as write
        from upcycle.routing.steering import Steering
        from upcycle.targets.load import load

    if len(adapters) not in (0, 1, len(prompts)):
        raise click.UsageError(
            f"--adapter: {len(adapters)} of them for {len(prompts)} prompts; give one, or one for "
            "each prompt (`base` for none)"
        )
    check_mixture(directory)
    setting = None if steering is None else Steering.load(steering)
    files = [file for file in dict.fromkeys(adapters) if file != "base"]
    beside = [ExpertAdapter.load(file) for file in files]
    model: Any = load(directory, trust_remote_code=trust_remote_code)
    texts = write(
        model,
        _tokenizer(directory, trust_remote_code),
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        k=k,
        suppress=suppress,
        force=force,
        steering=setting,
        contrast=None if contrast is None else Contrast(**contrast),
        adapters=beside,
        adapter_ids=[files.index(file) if file != "base" else -1 for file in adapters] or [0],
    )
    data = [{"prompt": p, "text": text} for p, text in zip(prompts, texts, strict=True)]
    console.show(as_json, data, lambda: [one["prompt"] + one["text"] for one in data])


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--toward",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Prompts of the behaviour, one on each line, or .jsonl.",
)
@click.option(
    "--others",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Prompts without it.",
)
@options.text_field
@click.option("--top", type=click.IntRange(min=1), default=10, help="Experts of all layers.")
@click.option(
    "--action",
    type=click.Choice(["suppress", "force"]),
    default="suppress",
    help="What is done with these experts.",
)
@click.option("--about", default="", help="What the setting is for, in words.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The setting."
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@options.as_json
@options.trust
@options.log
def steer(
    directory: Path,
    toward: Path,
    others: Path,
    text_field: str,
    top: int,
    action: str,
    about: str,
    out: Path,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Find the experts of a behaviour in DIRECTORY by two sets of prompts, and write a setting.

    `upcycle generate --steer FILE` uses it, and `upcycle.Steering.load(FILE).attach(model)`.

    \b
    Example: upcycle steer smollm2-moe --toward refused.txt --others answered.txt --out steer.json
    """
    with collector_paused():
        from upcycle.cli.mixture import check_mixture
        from upcycle.cli.new_file import check_new_file
        from upcycle.cli.tables import new_table
        from upcycle.operations.prompts import read_prompts, steering
        from upcycle.targets.load import load

    check_new_file(out, overwrite=overwrite)
    check_mixture(directory)
    sets = {name: read_prompts(path, text_field) for name, path in (("a", toward), ("b", others))}
    model = load(directory, trust_remote_code=trust_remote_code)
    with console.progress() as progress:
        found = steering(
            model,
            _tokenizer(directory, trust_remote_code),
            toward=sets["a"],
            others=sets["b"],
            top=top,
            action="force" if action == "force" else "suppress",
            about=about,
            done=lambda at, of: progress("tracing prompts", at, of),
        )
    found.save(out)
    table = new_table("layer", "expert", "")
    for layer, expert in found.suppress or found.force:
        table.add_row(str(layer), str(expert), action)
    data = {"out": str(out), action: [list(one) for one in found.suppress or found.force]}
    console.show(as_json, data, lambda: [table, f"written to {out}"])


def _tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    """The tokenizer of a directory.

    Raises:
        UsageError: it has none.
    """
    from upcycle.errors import UsageError
    from upcycle.models.tokenizer import tokenizer_in

    found = tokenizer_in(directory, trust_remote_code=trust_remote_code)
    if found is None:
        raise UsageError(f"{directory}: there is no tokenizer here, and prompts need one; add it")
    return found
