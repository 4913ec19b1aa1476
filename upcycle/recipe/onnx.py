"""The base of all sections of a recipe, and the section `onnx`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Form = Literal["fused", "unrolled", "dense", "quantised"]
FEW = 16
Tokens = Annotated[int, Field(ge=1, le=2**24)]


class Section(BaseModel):
    """Base of all parts of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Onnx(Section):
    """How the ONNX file is made, if there is to be one."""

    profile: Literal["cpu", "cuda", "portable"] = Field(
        "cpu",
        description="where it will run, which decides what is `auto`: cpu (the fastest exact form "
        "of each layer), cuda (fused, float16), portable (standard operations alone)",
    )
    form: Literal["auto", Form] = Field(
        "auto",
        description="fused: one node of ONNX Runtime for a layer; unrolled: standard operations "
        "for each expert; dense: all experts as one FFN, weighted; quantised: the fused node with "
        "rounded weights",
    )
    gelu: Literal["exact", "tanh"] = Field(
        "exact",
        description="tanh lets the fused node's form of GELU stand for the one with erf, which is "
        "off by 1e-3 of the output",
    )
    quantise: Literal[8, 4] | None = Field(
        None,
        description="bits of an expert's weight: all experts are rounded, by the quantised form, "
        "or unrolled with 8 bits where ONNX Runtime has no node for them",
    )
    block: Literal["auto", "adaptive", "row", 16, 32, 64, 128, 256] = Field(
        "auto",
        description="inputs that share one scale of a rounded row: so many, all of an expert's "
        "(row), or as few as a matrix needs, in the quantised form one of its layer (adaptive); "
        "auto: adaptive there, else 128",
    )
    weights: Literal["float", "int8"] = Field(
        "float",
        description="int8: every matrix of the model has 8 bits: experts (or as `quantise` says), "
        "other linear maps and embeddings; routers do not",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="of the graph; auto is float16 for cuda, else float32"
    )
    tokens: Tokens | tuple[Tokens, Tokens] | None = Field(
        None,
        description="tokens of one call, for which `auto` chooses the fastest form; of short and "
        "of long calls, for which a layer may get two; default: 1 and 256 for a decoder with a "
        "cache, else 256",
    )
    cache: bool = Field(
        True,
        description="a decoder's file reads and returns its key-value cache; a model whose cache "
        "no file can hand on is refused unless this is false",
    )

    @field_validator("tokens")
    @classmethod
    def _in_order(cls, tokens: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if isinstance(tokens, tuple) and tokens[0] >= tokens[1]:
            raise ValueError(f"short calls have fewer tokens than long ones, not {list(tokens)}")
        return tokens

    @model_validator(mode="after")
    def _form_can_round(self) -> "Onnx":
        if self.rounds and self.form in ("fused", "dense"):
            key = "quantise" if self.quantise else "weights"
            raise ValueError(
                f"`form: {self.form}` keeps the experts in floats, and `{key}` rounds them; leave "
                "`form` out, or take quantised or unrolled"
            )
        return self

    @property
    def calls(self) -> tuple[int, ...]:
        """Tokens of a typical call, or of a short and of a long one."""
        return self.tokens if isinstance(self.tokens, tuple) else (self.tokens or 256,)

    @property
    def half(self) -> Literal["float16", "bfloat16"] | None:
        """The narrow float type of the graph; None for float32."""
        if self.dtype == "auto":
            return "float16" if self.profile == "cuda" else None
        return None if self.dtype == "float32" else self.dtype

    @property
    def rounds(self) -> bool:
        """Whether experts are rounded."""
        return self.form == "quantised" or self.quantise is not None or self.weights == "int8"

    @property
    def unpacks(self) -> bool:
        """Whether rounded weights become floats when the file is loaded.

        That is as fast as a float file. ONNX Runtime's products with 8-bit weights are faster for a
        token or a few, and take up to twice as long for a text.
        """
        return self.profile != "cuda" and self.calls[0] >= FEW

    @property
    def bits(self) -> Literal[8, 4]:
        """Bits of a weight in the quantised form."""
        return self.quantise or 8


ONNX_DEFAULTS = Onnx()
