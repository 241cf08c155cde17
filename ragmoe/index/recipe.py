"""Index recipes: a YAML file that says what an index is built of, and how.

Paths are relative to the recipe's own folder; ``${NAME}`` stands for an environment variable.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ragmoe._errors import ConfigError
from ragmoe._variables import expand
from ragmoe.index.encoder import DEFAULT_ENCODER


class Recipe(BaseModel):
    """What a recipe may say; unknown keys are errors.

    Attributes:
        sources: files, folders, globs or ``hub:`` names.
        out: the index folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[str] = Field(min_length=1)
    out: str
    encoder: str = DEFAULT_ENCODER
    query_prompt: str | None = None
    passage_prompt: str | None = None
    domain: str | None = None
    chunk_words: int = 200
    chunk_overlap: int = 40
    rechunk: bool = False
    on_error: Literal["fail", "skip"] = "fail"
    long_passages: Literal["windows", "truncate"] = "windows"
    text_encoding: str = "utf-8"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    batch_tokens: int | None = None


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe, variables filled in and paths made absolute or relative to where we are.

    Raises:
        ConfigError: the file is missing, not YAML, says something unknown or wrong, or names a variable that is not
        set.
    """
    file = Path(path)
    try:
        content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        near = ", ".join(sorted(p.name for p in file.parent.glob("*.yaml"))) if file.parent.is_dir() else ""
        raise ConfigError(
            f"recipe {path}: there is no such file" + (f"; in {file.parent} there is: {near}" if near else "")
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"recipe {path}: {reasons}", hint=f"keys: {', '.join(Recipe.model_fields)}") from None
    return recipe.model_copy(
        update={
            "sources": [_place(source, file) for source in recipe.sources],
            "out": _place(recipe.out, file),
            "encoder": _encoder(recipe.encoder, file),
        }
    )


def _place(source: str, recipe: Path) -> str:
    filled = expand(source, f"recipe {recipe}")
    if filled.startswith("hub:"):
        return filled
    # normpath, not resolve: a message should show the path as the recipe means it, links included.
    return os.path.normpath(recipe.parent / filled)


def _encoder(name: str, recipe: Path) -> str:
    """A folder, by its place beside the recipe, where there is one or it can be nothing else; or else a name."""
    filled = expand(name, f"recipe {recipe}")
    if filled == DEFAULT_ENCODER:
        return filled
    placed = _place(filled, recipe)
    return placed if filled.startswith(".") or Path(placed).is_dir() else filled
