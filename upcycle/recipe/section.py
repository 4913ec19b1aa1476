"""What all parts of a recipe have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all parts of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
