"""A file for llama.cpp."""

from upcycle.conversion.exports.task import Exported, Task
from upcycle.errors import UnsupportedError
from upcycle.models.companions import copy_licences
from upcycle.models.tokenizer import tokenizer_in
from upcycle.targets.gguf.write import TYPE_OF, GgufType, write_gguf
from upcycle.util.modules import eval_mode, model_dtype
from upcycle.util.progress import step
from upcycle.verification.gguf import verify_gguf, with_weights_of
from upcycle.verification.whole_model import compare_models


def write(task: Task, gguf_type: GgufType | None) -> Exported:
    """Write the file, and read every tensor back."""
    copy_licences(task.source, task.folder)
    tokenizer = tokenizer_in(task.source, trust_remote_code=task.trust_remote_code)
    model, name = task.model, task.source.resolve().name
    if tokenizer is None:
        raise UnsupportedError(
            f"gguf: {name} has no tokenizer, and a file for llama.cpp contains one; copy the files "
            "of the tokenizer there"
        )
    kind: GgufType = gguf_type or TYPE_OF.get(model_dtype(model), "f32")
    path = task.folder / f"model-{kind}.gguf"
    with step(task.progress, "writing"):
        content = write_gguf(path, model, tokenizer, kind, name)
    if not task.verify:
        return Exported(f"gguf, {kind}", ())
    with step(task.progress, "reading again"):
        checks = verify_gguf(path, content)
        rounded = None
        if kind != TYPE_OF.get(model_dtype(model)):
            again = with_weights_of(path, model, content)
            with eval_mode(model, again):
                found = compare_models(model, again, task.evaluation, predictions=False)
            rounded = max(found.outputs.values(), key=lambda output: output.relative)
    return Exported(f"gguf, {kind}", checks, rounded=rounded)
