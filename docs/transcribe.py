"""The text of 16 kHz speech, by a Whisper in ONNX: python docs/transcribe.py DIRECTORY WAV"""

import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor

PROMPT, END = ["<|startoftranscript|>", "<|notimestamps|>"], "<|endoftext|>"  # English models


def transcribe(directory: str, wav: str, most: int = 200) -> str:
    """What is said in the first 30 seconds of a file of one channel and 16 bits."""
    folder, tokenizer = Path(directory), Tokenizer.from_file(f"{directory}/tokenizer.json")
    with wave.open(wav) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768)
    extract = WhisperFeatureExtractor.from_pretrained(directory)
    features = extract(sound, sampling_rate=16000, return_tensors="np").input_features
    encoder = onnxruntime.InferenceSession(folder / "encoder_model.onnx")
    decoder = onnxruntime.InferenceSession(folder / "decoder_with_past_model.onnx")
    names = [value.name.replace("present", "past_key_values") for value in encoder.get_outputs()]
    heard = dict(zip(names, encoder.run(None, {"input_features": features}), strict=True))
    inputs = {value.name: value.shape for value in decoder.get_inputs()}
    empty = {n: np.zeros((1, s[1], 0, s[3]), np.float32) for n, s in inputs.items() if len(s) == 4}
    past = {name: heard.get(name, nothing) for name, nothing in empty.items()}
    outputs = [value.name.replace("present", "past_key_values") for value in decoder.get_outputs()]
    tokens = np.array([[tokenizer.token_to_id(word) for word in PROMPT]])
    made = [-1]
    while len(made) <= most and made[-1] != tokenizer.token_to_id(END):
        result = dict(zip(outputs, decoder.run(None, {"input_ids": tokens, **past}), strict=True))
        tokens = result.pop("logits")[:, -1:].argmax(-1)
        past |= result
        made.append(int(tokens[0, 0]))
    return str(tokenizer.decode(made[1:])).strip()


if __name__ == "__main__":
    print(transcribe(sys.argv[1], sys.argv[2]))
