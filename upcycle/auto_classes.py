"""Register converted models with the Auto classes of transformers, so they need no trust flag.

A model type ``upcycle_X`` stands for the dense type X with the layers that ``config.json``
describes. There are as many as transformers has model types, so their classes are made on demand,
and nothing is imported before. A directory's own Python file is then not run.
"""

import importlib.util
import sys
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.configuration_auto"
_PREFIX = "upcycle_"


def register() -> None:
    """Teach transformers the converted model types, now or when it is imported."""
    if _MODULE in sys.modules:
        _teach(sys.modules[_MODULE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(MetaPathFinder):
    """Waits for the module of transformers that maps model types to configurations."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _teach(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _teach(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    registered = getattr(mapping, "_extra_content", None)
    # Without the attribute this transformers keeps its types elsewhere: the trust flag stays.
    if type(registered) is dict:
        mapping._extra_content = _OnDemand(registered, module.CONFIG_MAPPING_NAMES)


class _OnDemand(dict[str, Any]):
    """Model type -> configuration class, of which those of converted models are made here."""

    def __init__(self, registered: dict[str, Any], dense_types: Any) -> None:
        super().__init__(registered)
        self._dense_types = dense_types

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (
            isinstance(key, str)
            and key.startswith(_PREFIX)
            and key.removeprefix(_PREFIX) in self._dense_types
        )

    def __missing__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(key)
        self[key] = _make(key.removeprefix(_PREFIX))
        return self[key]


def _make(dense_type: str) -> type:
    """The configuration class for a dense model type; its model classes are registered."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    from upcycle.layers.pretrained import UpcycledConfig, UpcycledModel
    from upcycle.targets import remote_code

    dense_config: Any = CONFIG_MAPPING[dense_type]

    class Config(UpcycledConfig, dense_config):  # type: ignore[misc]
        model_type = f"{_PREFIX}{dense_type}"

    @cache
    def converted(dense: Any) -> type:
        class Model(UpcycledModel, dense):  # type: ignore[misc]
            config_class = Config

            def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
                """As the dense model; also writes the file that stands in for upcycle."""
                sites = self.config.upcycle["sites"]
                classes = remote_code.heads(dense_config, dense)
                self.config.auto_map = remote_code.auto_map(dense_config, classes)
                super().save_pretrained(save_directory, *args, **kwargs)
                if Path(save_directory).is_dir():
                    text = remote_code.modeling_text(dense_config, classes, sites)
                    path = Path(save_directory) / remote_code.FILE
                    path.write_text(text, encoding="utf-8")

        return _named(Model, dense)

    _named(Config, dense_config)
    for name, dense_classes in remote_code.auto_mapping(dense_config).items():
        classes = tuple(map(converted, dense_classes))
        mapping = getattr(modeling_auto, name)._model_mapping
        mapping.register(Config, classes if len(classes) > 1 else classes[0])
    return Config


def _named(cls: type, dense: type) -> type:
    """`cls` under the name that it has in a modeling file."""
    cls.__name__ = cls.__qualname__ = f"Upcycle{dense.__name__}"
    cls.__doc__ = f"{dense.__name__} with MoE layers in the place of dense FFNs."
    globals()[cls.__name__] = cls  # where pickle looks for it
    return cls
