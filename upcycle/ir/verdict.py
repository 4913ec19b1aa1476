"""What a conversion means for its user, in a few sentences: how good, how fast, and what to do."""

from dataclasses import dataclass
from typing import Literal

from upcycle.ir.measured import Costs, Distance, ModelDistance
from upcycle.ir.rounding import is_rounding
from upcycle.util.wording import size

BUILT_IN = ("the documentation of Python", "random inputs")  # what is read where nothing is given
TRAINED = "trained"  # in the place of a recipe, where the model was trained after its conversion
Level = Literal["equal", "near", "changed", "far", "unknown"]

# Up to which a result is near to the dense model, or changed: the factor on its perplexity; without
# a language model, for scores the part of the rows with the same largest entry, and else the mean
# cosine. docs/quality.md has what they are taken from: MiniLM's embeddings keep 99 % of their rank
# correlation with human judgements at a cosine of 0.986 and 92 to 94 % at 0.92 to 0.96; below that
# every recipe loses more. The cosine of scores says nothing: they have most of their length in
# common, and BERT-tiny keeps 0.998 where a third of the largest entries are others.
NEAR = {"perplexity": 1.05, "agreement": 0.95, "cosine": 0.98}
CHANGED = {"perplexity": 1.5, "agreement": 0.75, "cosine": 0.90}


@dataclass(frozen=True)
class Verdict:
    """What to think of a result.

    Attributes:
        level: ``equal`` to the dense model up to rounding, ``near`` to it, ``changed`` (to be tried
            on the task), ``far`` (not for use before training), or ``unknown``.
        headline: one clause.
        quality, work, advice: a sentence each.
        size: a sentence on a file with rounded weights, if there is one.
    """

    level: Level
    headline: str
    quality: str
    work: str
    advice: str
    size: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """The sentences that are there, in order."""
        return tuple(line for line in (self.quality, self.work, self.size, self.advice) if line)


def verdict(
    promise: str,
    costs: Costs | None,
    found: ModelDistance | None,
    *,
    dtype: str,
    recipe: str,
    fitted: bool = False,
    merged: bool = False,
    equal_layers: bool = False,
    rounded_bytes: int | None = None,
    unmeasured: str = "`upcycle convert` measures it.",
) -> Verdict:
    """The verdict on a result, or, without measurements, on a plan.

    Args:
        promise: of the plan.
        costs: before and after.
        found: the distance of the whole model from the dense one, if it was measured.
        dtype: of the dense weights, such as ``float32``.
        recipe: its name.
        fitted: it fits what is left out to calibration data, as the recipe upcycle does.
        merged: its experts come from several models.
        rounded_bytes: of the ONNX files on disk, if their weights are rounded.
        equal_layers: every layer was measured to equal its dense FFN, and the whole was not run.
        unmeasured: the advice if nothing is known.
    """
    level = _level(promise, found, dtype, equal_layers)
    work = None if costs is None else costs.flops_after / max(costs.flops_before, 1)
    return Verdict(
        level=level,
        headline=_headline(level, promise, work, recipe),
        quality=_quality(level, promise, found, equal_layers=equal_layers, merged=merged),
        work=_work(costs, work),
        advice=_advice(
            level,
            promise,
            costs,
            work,
            recipe,
            unmeasured,
            fitted=fitted or recipe == "upcycle",
            merged=merged,
            rounded=rounded_bytes is not None,
        ),
        size=_size(costs, rounded_bytes),
    )


def _level(promise: str, found: ModelDistance | None, dtype: str, equal_layers: bool) -> Level:
    if found is None:
        return "equal" if equal_layers else "unknown"
    if is_rounding(found.relative, dtype):
        return "equal"
    if language := found.language_model:
        factor = language.converted_perplexity / language.dense_perplexity
        is_near, is_like = (factor <= most["perplexity"] for most in (NEAR, CHANGED))
    else:
        figures = [_figure(output) for output in found.outputs.values()]
        is_near, is_like = (all(v >= least[of] for of, v in figures) for least in (NEAR, CHANGED))
    return "near" if is_near else "changed" if is_like else "far"


def _figure(output: Distance) -> tuple[str, float]:
    """What an output is judged by, and its figure: 1 is the best."""
    if output.top1_agreement is not None:
        return "agreement", output.top1_agreement
    return "cosine", output.mean_cosine


def _headline(level: Level, promise: str, work: float | None, recipe: str) -> str:
    if recipe == TRAINED and level != "equal":
        return "trained further, and no longer the dense model"
    said = {
        "equal": "exact" if promise == "exact" else "equal to the dense model as it is now",
        "near": "approximate, and near to the dense model",
        "changed": "approximate: try it on your task before you use it",
        "far": "approximate: not for use before training",
        "unknown": "exact by its algebra, not measured" if promise == "exact" else "not measured",
    }[level]
    if work is None or level in ("changed", "far"):
        return said
    return f"{said}, with {work:.2f} times the FFN work of a token"


def _quality(
    level: Level,
    promise: str,
    found: ModelDistance | None,
    *,
    equal_layers: bool,
    merged: bool,
) -> str:
    if found is None:
        if equal_layers:
            return "Every layer equals its dense FFN, up to rounding; the whole model was not run."
        if promise == "exact":
            return "The outputs will equal those of the dense model, up to rounding."
        return "How far the outputs are from those of the dense model is not known yet."
    if level == "equal":
        return (
            "The outputs equal those of the dense model, up to rounding (largest error "
            f"{found.relative:.1e} of the largest value)."
        )
    said = likeness(found, "the dense model")
    if not (merged and found.inputs in BUILT_IN):
        return said
    text = "" if "random" in found.inputs else "That text says little of what the sources know. "
    return f"{said} {text}`upcycle verify` compares on your own (`data`)."


def likeness(found: ModelDistance, other: str, digits: int = 2) -> str:
    """How alike to `other` a model is, in a sentence; `digits` of the factor on perplexity."""
    if (language := found.language_model) is not None:
        dense, converted = language.dense_perplexity, language.converted_perplexity
        return (
            f"Perplexity is {converted / dense:.{digits}f} times that of {other} "
            f"({converted:.4g} against {dense:.4g}, {language.tokens} tokens of {found.inputs}), "
            f"and {language.top1_agreement:.{digits - 2}%} of its next tokens are the same."
        )
    random = ", which say little of real ones" if "random" in found.inputs else ""
    name, output = min(found.outputs.items(), key=lambda item: _figure(item[1])[1])
    where = f"measured on {found.inputs}{random}."
    if output.top1_agreement is not None:
        same = f"{output.top1_agreement:.1%}"
        return f"{same} of the largest entries of `{name}` are those of {other}, {where}"
    mean, least = (f"{value:.{digits + 1}f}" for value in (output.mean_cosine, output.min_cosine))
    return (
        f"`{name}` is {mean} alike to that of {other} (mean cosine, 1 is the same; the least is "
        f"{least}), {where}"
    )


def _work(costs: Costs | None, work: float | None) -> str:
    if costs is None or work is None:
        return ""
    factor = costs.parameters_after / costs.parameters_before
    active = costs.active_parameters / costs.parameters_after
    return (
        f"The converted FFNs do {work:.2f} times the work for each token; the model has "
        f"{factor:.2f} times the parameters, {active:.0%} of them active."
    )


def _size(costs: Costs | None, rounded_bytes: int | None) -> str:
    if rounded_bytes is None:
        return ""
    dense = ""
    if costs is not None and costs.bytes_before:
        part = rounded_bytes / costs.bytes_before
        dense = f", {part:.2f} times the {size(costs.bytes_before)} of the dense weights"
    return f"With its rounded weights the ONNX file takes {size(rounded_bytes)} on disk{dense}."


def _advice(
    level: Level,
    promise: str,
    costs: Costs | None,
    work: float | None,
    recipe: str,
    unmeasured: str,
    *,
    fitted: bool,
    merged: bool,
    rounded: bool,
) -> str:
    grows = costs is not None and costs.parameters_after > 1.1 * costs.parameters_before
    saves = work is not None and work < 0.95
    if (level == "equal" and grows) or (level == "unknown" and promise == "exact" and grows):
        return "Train it: until its experts differ it is the dense model at a higher price."
    if level == "equal" and not saves and rounded:
        return "It saves bytes and no work; for less work take the recipe upcycle."
    if level == "equal" and not saves:
        return "It saves nothing by itself: it is a start for training, or a check of a split."
    if level == "unknown" and promise != "exact":
        return unmeasured
    if recipe == TRAINED:
        return "It was trained after its conversion: judge it by your task, not by the dense model."
    if level in ("changed", "far") and merged:
        return "Train it before it is used, its routers at least: they send tokens anywhere."
    if level in ("changed", "far") and fitted:
        return (
            "It was fitted to text and measured on text of the same kind, and on other text it is "
            "further off: give your own (`calibration`). Wider experts (experts.width) bring it "
            "nearer without training; training does the rest."
        )
    if level in ("changed", "far") and saves:
        return (
            "Train it, or convert with the recipe upcycle, whose fit keeps more without training."
        )
    if level in ("changed", "far"):
        return "Train it before it is used."
    return "`upcycle bench` measures its speed; `against=MODEL` names the dense model."
