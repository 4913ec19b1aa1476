"""Greedy text from an ONNX file with a cache: python docs/generate.py DIRECTORY PROMPT [TOKENS]"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def generate(directory: str, prompt: str, most: int = 50) -> str:
    """What greedy decoding adds to `prompt`: at most `most` tokens."""
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    ends = np.ravel(json.loads(Path(directory, "config.json").read_text())["eos_token_id"])
    session = onnxruntime.InferenceSession(Path(directory, "model.onnx"))
    outputs = [value.name for value in session.get_outputs()]
    inputs = {value.name: value.shape for value in session.get_inputs()}
    past = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)  # nothing has been read yet
        for name, shape in inputs.items()
        if name.startswith("past_key_values.")
    }
    tokens = np.array([tokenizer.encode(prompt).ids])
    length, made = 0, [-1]
    while len(made) <= most and made[-1] not in ends:
        positions = np.arange(length, length + tokens.shape[1])[None]
        length += tokens.shape[1]
        feeds = {"input_ids": tokens, "attention_mask": np.ones((1, length), np.int64), **past}
        if "position_ids" in inputs:
            feeds["position_ids"] = positions
        result = dict(zip(outputs, session.run(None, feeds), strict=True))
        past = {name: result[name.replace("past_key_values", "present")] for name in past}
        tokens = result["logits"][:, -1:].argmax(-1)
        made.append(int(tokens[0, 0]))
    return str(tokenizer.decode(made[1:]))


if __name__ == "__main__":
    print(generate(sys.argv[1], sys.argv[2], *(int(count) for count in sys.argv[3:])))
