"""The dense model that the user names: the checkpoint of a directory, or a Python callable."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.export import ExportedProgram

from upcycle.capture.capture import ExampleInputs
from upcycle.errors import UnsupportedError, UpcycleError, UsageError, is_out_of_memory, one_line
from upcycle.graphs.program import module_of
from upcycle.ir.report import HubSource
from upcycle.models import samples
from upcycle.models.checkpoint_fit import fit, stored_apart
from upcycle.models.checkpoint_tensors import has_metadata, has_weights, read_tensors
from upcycle.models.configuration import (
    class_named,
    read_config,
    with_text,
)
from upcycle.models.places import Fetch
from upcycle.models.program_file import is_program, open_program
from upcycle.util.named_callable import call_named
from upcycle.util.progress import Progress, silent
from upcycle.util.quiet import quiet_transformers

if TYPE_CHECKING:
    pass


@dataclass
class Source:
    """A dense model and how to get at it.

    Attributes:
        name: as the user wrote it.
        directory: of the Hugging Face checkpoint, or None for a Python callable.
        example: inputs that the user gave, or None to guess them.
        dtype: to load the weights in, or None for the checkpoint's own.
        hub: the repository that it comes from.
        weights: brings them, where `directory` has only the configuration and the tokenizer.
    """

    name: str
    directory: Path | None
    example: ExampleInputs | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_pickle: bool = False
    hub: HubSource | None = None
    weights: Fetch | None = None

    @cached_property
    def program(self) -> ExportedProgram:
        """What is in the file of `torch.export`."""
        trust = {"allow_pickle": self.allow_pickle, "trust": self.trust_remote_code}
        return open_program(Path(self.name), **trust)

    def fetched(self, progress: Progress = silent) -> "Source":
        """With all of it on this machine: downloaded, unpacked or merged if that is to be done."""
        if self.weights is None:
            return self
        return replace(self, directory=self.weights(progress), weights=None)

    @property
    def paths(self) -> list[Path]:
        """What the model is read from on this machine, and must not be written over."""
        named = [Path(self.name)] if Path(self.name).exists() else []
        return [self.directory, *named] if self.directory else named * self.is_program

    @property
    def is_program(self) -> bool:
        """Whether it is a file of `torch.export`."""
        return self.directory is None and is_program(self.name)

    @property
    def label(self) -> str:
        """How reports and cards name it: without the path to it on this machine."""
        if self.hub is not None:
            return self.hub.hub
        if self.is_program:
            return Path(self.name).name
        if self.directory is None or self.name.startswith(samples.PREFIX):
            return self.name
        path = Path(self.name).absolute()
        is_part = path.is_file() and path.suffix != ".gguf"
        return path.parent.name if is_part else path.name

    def skeleton(self) -> nn.Module:
        """The model without weights: on the meta device where it comes from a configuration."""
        if self.directory is None:
            return self._called()
        return self._built(self._config()).eval()

    def _config(self) -> Any:
        """The configuration; tensors that are stored apart are tied no more, whatever it says."""
        assert self.directory is not None
        config = read_config(self.directory, trust_remote_code=self.trust_remote_code)
        if any(getattr(part, "tie_word_embeddings", False) for part in with_text(config)):
            stored = self._stored()
            if stored and stored_apart(stored, self._built(config)):
                for part in with_text(config):
                    part.tie_word_embeddings = False
        return config

    def _built(self, config: Any) -> nn.Module:
        """On the meta device."""
        cls = self._model_class(config)
        try:
            with torch.device("meta"), quiet_transformers():
                model: nn.Module = (
                    cls.from_config(config, trust_remote_code=self.trust_remote_code)
                    if hasattr(cls, "from_config")
                    else cls(config)
                )
        except Exception as error:
            raise _unless_ours(
                error, f"{self.directory}/config.json: no model can be built from it"
            ) from error
        return model

    def _stored(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the directory; none where it has a configuration alone."""
        assert self.directory is not None
        if has_weights(self.directory, allow_pickle=self.allow_pickle):
            return read_tensors(self.directory, allow_pickle=self.allow_pickle)
        return {}

    def unread(self, skeleton: nn.Module) -> tuple[str, ...]:
        """The stored tensors that nothing in the model reads; for all others, that they fit.

        Raises:
            UsageError: a tensor has another shape or type than the model's.
        """
        stored = self._stored() if self.directory is not None else {}
        if not stored:
            return ()
        assert self.directory is not None
        found = fit(self.directory, stored, skeleton)
        if isinstance(found, str):
            return ()
        ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        return tuple(n for n in found.unread if not any(re.search(i, n) for i in ignored))

    def _called(self) -> nn.Module:
        """What the callable returns, on the device; a model without weights stays as it is. Of a
        program, its graph."""
        if self.is_program:
            return module_of(self.program)
        module: nn.Module = call_named(self.name, nn.Module, "an nn.Module")
        if self.dtype is not None:
            module = module.to(self.dtype)
        return module.eval() if _is_meta(module) else module.to(self.device).eval()

    def load(self, *, mapped: bool = False) -> nn.Module:
        """The model with its weights, in eval mode.

        `mapped` leaves the weights of a directory in their files, memory-mapped.

        Raises:
            UsageError: the files are broken, or do not fit the configuration.
        """
        if self.weights is not None:
            return self.fetched().load(mapped=mapped)
        if self.directory is None:
            module = self._called()
            if _is_meta(module):
                raise UsageError(
                    f"{self.name}: the model has no weights, it is on the meta device; give one "
                    "that has them (inspect and plan need none)"
                )
            return module
        config = self._config()
        stored = read_tensors(self.directory, allow_pickle=self.allow_pickle)  # or what is broken
        options: dict[str, Any] = {"trust_remote_code": True} if self.trust_remote_code else {}
        # Transformers reads no index that has no metadata, and adds an adapter if peft is there.
        mapped = mapped or not has_metadata(self.directory)
        if mapped:
            options["state_dict"] = dict(stored)
        try:
            with quiet_transformers():
                model, info = self._model_class(config).from_pretrained(
                    None if mapped else self.directory,
                    config=config,
                    dtype=self.dtype or "auto",
                    output_loading_info=True,
                    local_files_only=True,
                    ignore_mismatched_sizes=True,
                    **options,
                )
        except Exception as error:
            raise _unless_ours(error, f"{self.directory}: the model cannot be loaded") from error
        if info["mismatched_keys"]:
            name, there, wanted = sorted(info["mismatched_keys"])[0]
            raise UsageError(
                f"{self.directory}: {name} is {list(there)} in the file and {list(wanted)} by "
                "config.json; one of the two belongs to another model"
            )
        if missing := sorted(info["missing_keys"]):
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise UsageError(
                f"{self.directory}: the files lack {missing[0]}{more}; is config.json of another "
                "model?"
            )
        return model.to(self.device).eval()  # type: ignore[no-any-return]

    def _model_class(self, config: Any) -> Any:
        if self.trust_remote_code:
            for name in getattr(config, "auto_map", None) or ():
                if str(name).startswith("AutoModel") and class_named(name) is not None:
                    return class_named(name)
        name = str(next(iter(config.architectures or ["AutoModel"])))
        found = class_named(name)
        if found is None:
            raise UnsupportedError(
                f"{self.directory}: the architecture {name} is not part of transformers "
                f"{transformers.__version__}; if the checkpoint brings its own code, pass "
                "`trust_remote_code=True`"
            )
        return found


def _is_meta(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def _unless_ours(error: Exception, problem: str) -> Exception:
    """What to raise for a failure inside transformers; lack of memory is no fault of the model."""
    if isinstance(error, UpcycleError) or is_out_of_memory(error):
        return error
    return UsageError(f"{problem}: {one_line(error)}")
