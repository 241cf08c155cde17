"""The tokenizer of a causal language model, as a folder or the Hub has it."""

from __future__ import annotations

import os
from typing import Any

from ragmoe._errors import ModelError
from ragmoe._quiet import quiet_loading


def open_tokenizer(folder: str | os.PathLike[str], model: Any) -> Any:
    """The tokenizer that lies beside a model.

    Args:
        folder: of the model, or its Hub id.
        model: the model, which must have an embedding for each token.

    Raises:
        ModelError: there is no tokenizer, or one with more tokens than the model has embeddings.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_loading():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no tokenizer that could be opened: {str(error).strip().splitlines()[0]}",
            hint=f"in Python: AutoTokenizer.from_pretrained(BASE).save_pretrained({str(folder)!r})",
        ) from error
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, but the model has embeddings for {rows}",
            hint="in Python: model.resize_token_embeddings(len(tokenizer)), then model.save_pretrained(FOLDER)",
        )
    return tokenizer
