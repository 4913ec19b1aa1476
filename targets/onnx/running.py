"""Running ONNX files whose inner tensors are wanted too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from upcycle.errors import UnsupportedError, UsageError
from upcycle.targets.onnx.feeds import Array


def run(path: Path, feeds: Mapping[str, Array], extra: Sequence[str] = ()) -> dict[str, Array]:
    """All outputs of a file on the CPU, and the inner tensors named in `extra`, by name.

    Weights in external files are mapped by ONNX Runtime and not read here.

    Raises:
        UsageError: ONNX Runtime is not installed.
        UnsupportedError: it cannot load the file, or not run it on `feeds`.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "running an ONNX file needs ONNX Runtime: pip install 'upcycle[cpu]' "
            "(or 'upcycle[gpu]', not both)"
        ) from error
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "1")  # a copy of each weight
    options.log_severity_level = 4  # what matters comes as an exception
    try:
        model = _with_outputs(path, extra) if extra else path
        if extra:
            folder = str(path.parent.absolute())
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, folder)
        session: Any = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(None, dict(feeds)), strict=True))
    except Exception as error:  # onnxruntime's own types, which say what and where
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"ONNX Runtime cannot run {path.name}: {reason}") from error


def _with_outputs(path: Path, names: Sequence[str]) -> bytes:
    proto = onnx.load(path, load_external_data=False)
    known = {value.name for value in proto.graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(proto.SerializeToString())
