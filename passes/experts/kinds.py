"""What each kind of expert methods makes: how many experts, how wide, and what it cannot do."""

from collections.abc import Iterator

from upcycle.ir.ffn import FFN
from upcycle.passes.experts.method import ExpertMethod
from upcycle.passes.experts.useful import NEEDS
from upcycle.recipe.schema import Experts, Recipe


def routed_experts(method: ExpertMethod, experts: Experts) -> int:
    """Routed experts of the layer."""
    if method.kind == "slices":
        return experts.count * experts.granularity
    return experts.count - (experts.shared if isinstance(experts.shared, int) else 0)


def shared_neurons(method: ExpertMethod, ffn: FFN, experts: Experts) -> int:
    """Neurons of the shared expert."""
    if method.kind == "residual" or (method.kind == "copies" and experts.shared):
        return ffn.d_ff
    part = experts.shared / (experts.count if isinstance(experts.shared, int) else 1)
    return round(ffn.d_ff * part)


def neurons_of_expert(method: ExpertMethod, ffn: FFN, experts: Experts) -> int:
    """Neurons of one routed expert, zero padding included."""
    if method.kind in ("slices", "residual"):
        return -(-ffn.d_ff // experts.granularity)
    if not method.deals_neurons:
        return ffn.d_ff
    rest = ffn.d_ff - shared_neurons(method, ffn, experts)
    if experts.width is not None:
        return min(max(round(ffn.d_ff * experts.width), 1), rest)
    return -(-rest // routed_experts(method, experts))


def sharing_problem(method: ExpertMethod, experts: Experts) -> str | None:
    """Why ``experts.shared`` makes no layer, or None."""
    if experts.shared and method.kind == "copies" and experts.shared != 1:
        return "one copy can be permanent; set `experts.shared: 1`, or leave it out"
    if experts.shared and not method.deals_neurons and method.kind != "copies":
        return f"`experts.method: {method.name}` makes no shared expert; leave `experts.shared` out"
    if experts.shared >= experts.count:
        return (
            f"{experts.shared} of {experts.count} experts cannot be shared; "
            f"set `experts.shared` below {experts.count}"
        )
    return None


def kind_problems(method: ExpertMethod, ffn: FFN, recipe: Recipe) -> Iterator[str]:
    """What a recipe without a `sharing_problem` asks for and no method of the kind does."""
    experts, kind = recipe.experts, method.kind
    if experts.width is not None and kind != "subsets":
        yield (
            f"`experts.method: {method.name}` decides itself how wide an expert is; leave "
            "`experts.width` out"
        )
    can_adapt = kind == "split" and experts.shared and experts.shared_by in NEEDS
    if experts.adaptive and not can_adapt and experts.width is None:
        yield (
            "`experts.adaptive` divides the shared neurons of a split among the layers, by what "
            "calibration shows; set `experts.shared`, and `experts.shared_by` to "
            f"{', '.join(NEEDS)}; or the neurons of the experts: set `experts.width`"
        )
    if recipe.compensate.any and not method.deals_neurons:
        yield f"`experts.method: {method.name}` drops no neurons; leave `compensate` out"
    if method.deals_neurons and shared_neurons(method, ffn, experts) >= ffn.d_ff:
        yield (
            f"a shared expert of all {ffn.d_ff} neurons leaves none for the others; "
            "set `experts.shared` lower"
        )
    if kind == "split" and experts.count > ffn.d_ff:
        yield (
            f"{experts.count} experts cannot share {ffn.d_ff} neurons; "
            f"set `experts.count` to {ffn.d_ff} or less"
        )
    if experts.sources and not method.has_sources:
        yield f"`experts.method: {method.name}` has no sources; set it to from_checkpoints"
