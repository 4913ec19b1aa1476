"""Time ONNX files of one model against each other, in turns: ``onnx_int8.py FLOAT INT8 [TOKENS]``.

Both are directories that upcycle wrote. Prints bytes, and milliseconds (lower quartile of 21 calls,
each file after the other) of one call on one thread, for texts of the given numbers of tokens.
"""

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

from upcycle.targets.onnx.decode import empty_past

CALLS = 21


def opened(directory: str) -> onnxruntime.InferenceSession:
    """The file of a directory, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        Path(directory) / "model.onnx", options, providers=["CPUExecutionProvider"]
    )


def feeds(session: onnxruntime.InferenceSession, tokens: int) -> dict[str, np.ndarray]:
    """One text, with an empty past where the file reads one."""
    ids = np.random.default_rng(0).integers(0, 1000, (1, tokens))
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(tokens)[None],
        "token_type_ids": np.zeros_like(ids),
    }
    names = [value.name for value in session.get_inputs()]
    return {name: known[name] for name in names if name in known} | empty_past(session, 1)


def main() -> None:
    """Print a row for each number of tokens."""
    names, lengths = sys.argv[1:3], [int(text) for text in sys.argv[3:]] or [1, 16, 256]
    for name in names:
        files = [*Path(name).glob("*.onnx*"), *Path(name).glob("*.safetensors")]
        print(name, *(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in files))
    sessions = [opened(name) for name in names]
    for tokens in lengths:
        times: list[list[float]] = [[], []]
        for _ in range(CALLS):
            for session, own in zip(sessions, times, strict=True):
                given = feeds(session, tokens)
                start = time.perf_counter()
                session.run(None, given)
                own.append(time.perf_counter() - start)
        first, second = (1e3 * float(np.quantile(own, 0.25)) for own in times)
        print(f"{tokens} tokens: {first:.2f} ms, {second:.2f} ms, ratio {second / first:.2f}")


if __name__ == "__main__":
    main()
