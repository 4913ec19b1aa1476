"""What torch does differently while a forward is recorded, so that each of its calls is seen."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributions import Distribution

from upcycle.util.modules import no_fast_path, set_within
from upcycle.util.quiet import quiet_logs

_run_script = torch.jit.ScriptFunction.__call__


@contextmanager
def recording() -> Iterator[None]:
    """Within it torch runs the model's own Python, call by call, and without gradients.

    Functions that were scripted or traced run as the Python that they were made from; inference
    mode, in which writes are not counted, is off; and the checks of distributions, which read
    values and change none, are left out. Warnings are not shown.
    """
    with torch.inference_mode(False), ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # in a compiled module no linear map is seen
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(no_fast_path())
        # torch writes about a guess that fails
        stack.enter_context(quiet_logs("torch._subclasses.fake_tensor", level=logging.CRITICAL))
        set_within(stack, torch.jit.ScriptFunction, "__call__", _run_python)
        set_within(stack, torch.inference_mode, "__enter__", lambda self: None)
        set_within(stack, torch.inference_mode, "__exit__", lambda self, *error: None)
        # The model says it again when it is run.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        set_within(stack, Distribution, "_validate_args", False)
        stack.enter_context(torch.no_grad())
        yield


def _run_python(script: Any, *args: Any, **kwargs: Any) -> Any:
    """A scripted function as Python, if it was made from that here."""
    python = getattr(script, "_torchdynamo_inline", None)
    return _run_script(script, *args, **kwargs) if python is None else python(*args, **kwargs)
