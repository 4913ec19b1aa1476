"""How to use a converted model, as a card says it: code that computes something."""

from dataclasses import dataclass

DIRECTORY = "path/to/this/directory"

# The task of the hub for an Auto class of transformers, if the dense model does not say.
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModel": "feature-extraction",
}
GENERATED = """\
inputs = tokenizer("The first thing to know is", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=20)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
COMPUTED = """\
inputs = tokenizer(["A man plays the guitar."], return_tensors="pt")
print(model(**inputs)[0].shape)"""

PAIR = (
    "With ONNX Runtime; the encoder runs once, and the decoder reads what it returns and its own "
    "past (`present.*` of one run is `past_key_values.*` of the next)"
)
CODE = (
    "With transformers; the code in this directory is run. After `import upcycle` its own classes "
    "are used, and no flag is needed"
)


@dataclass(frozen=True)
class Usage:
    """What the code depends on.

    Attributes:
        forms: of the files: ``native``, ``remote_code``, ``module``, ``onnx``, ``onnx_pair``,
            ``pt2``.
        auto_class: of transformers, that loads it.
        has_tokenizer: a tokenizer is in the directory.
    """

    forms: tuple[str, ...]
    auto_class: str = ""
    has_tokenizer: bool = False

    def snippets(self) -> list[tuple[str, str]]:
        """A title and Python code for each form."""
        return [self._snippet(form) for form in self.forms]

    def _snippet(self, form: str) -> tuple[str, str]:
        if form == "native":
            return "With transformers, no other package", self._transformers("")
        if form == "remote_code":
            return CODE, self._transformers(", trust_remote_code=True")
        if form == "module":
            return (
                "With upcycle; `dense` is an instance of the dense model's class",
                f'import upcycle\n\nmodel = upcycle.load("{DIRECTORY}", dense)',
            )
        if form == "pt2":
            lines = [
                "import torch\n",
                f'program = torch.export.load("{DIRECTORY}/model.pt2").module()',
                "print(program.graph.find_nodes(op='placeholder'))",
            ]
            return "With torch alone, as a program of torch.export", "\n".join(lines)
        if form == "onnx_pair":
            lines = [
                "import onnxruntime\n",
                f'folder = "{DIRECTORY}/"',
                'encoder = onnxruntime.InferenceSession(folder + "encoder_model.onnx")',
                'decoder = onnxruntime.InferenceSession(folder + "decoder_with_past_model.onnx")',
            ]
            return PAIR, "\n".join(lines)
        lines = [
            "import onnxruntime\n",
            f'session = onnxruntime.InferenceSession("{DIRECTORY}/model.onnx")',
            "for value in session.get_inputs():",
            "    print(value.name, value.type, value.shape)",
        ]
        return "With ONNX Runtime", "\n".join(lines)

    def _transformers(self, trust: str) -> str:
        classes = sorted([self.auto_class, *(["AutoTokenizer"] if self.has_tokenizer else [])])
        lines = [f"from transformers import {', '.join(classes)}\n"]
        lines += [f'directory = "{DIRECTORY}"']
        lines += [f"model = {self.auto_class}.from_pretrained(directory{trust})"]
        if self.has_tokenizer:
            lines += [f"tokenizer = AutoTokenizer.from_pretrained(directory{trust})\n"]
            lines += [GENERATED if self.auto_class == "AutoModelForCausalLM" else COMPUTED]
        return "\n".join(lines)
