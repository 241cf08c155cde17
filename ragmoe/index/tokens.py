"""A sentence-transformers text model fed with tokens that were made before, so that no text is tokenized twice.

The tokens of the next texts can be made in another thread meanwhile. What `SentenceTransformer.encode` does more than
that (other inputs, chat templates, prompts left out of the pooling) is left to it: `TokenEncoder.of` returns None.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ragmoe._threads import import_torch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Precision = Literal["fp32", "bf16"]
#: What the model reads of one text, int64 (1 or 2, tokens): ids, special tokens included, and types where it has any.
Tokens = NDArray[np.int64]

#: Tokens of a batch, padding included, that are tried; the first is the default. On a CPU what a batch needs in between
#: should stay in the caches; a GPU wants much at a time.
BUDGETS = {"cpu": (2048, 4096, 1024, 8192), "cuda": (65_536, 16_384, 262_144)}
_INPUTS = ({"input_ids", "attention_mask"}, {"input_ids", "token_type_ids", "attention_mask"})


class TokenEncoder:
    """The model of a text encoder and its tokenizer, apart from each other. Made by `of`.

    Args:
        model: float32; its modules are a transformer, pooling and at most normalisation.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        from tokenizers import Tokenizer

        tokenizer: Any = model.tokenizer
        backend = tokenizer.backend_tokenizer.to_str()
        # Copies of our own, never changed: sentence-transformers sets the shared one anew with each call.
        self._whole, self._cut = (Tokenizer.from_str(backend) for _ in range(2))
        for copied in (self._whole, self._cut):
            copied.no_padding()
            copied.no_truncation()
        self.max_length = int(model.max_seq_length or 0)
        self._cut.enable_truncation(self.max_length, direction=tokenizer.truncation_side)
        #: Special tokens that are added to a text.
        self.special = int(tokenizer.num_special_tokens_to_add())
        self._typed = "token_type_ids" in tokenizer.model_input_names
        self._padding = (tokenizer.pad_token_id, tokenizer.pad_token_type_id)
        self._device = model.device
        transformer, *rest = list(model)
        self._transformers: dict[str, Any] = {"fp32": transformer}
        self._rest: list[Any] = rest

    @classmethod
    def of(cls, model: SentenceTransformer) -> TokenEncoder | None:
        """Over a model, None where its pipeline does more than can be done here."""
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        modules = list(model)
        if [type(module) for module in modules] not in ([Transformer, Pooling], [Transformer, Pooling, Normalize]):
            return None
        transformer, pooling = modules[:2]
        tokenizer = model.tokenizer
        reads_text = set(transformer.modality_config) == {"text"} and not transformer.processing_kwargs
        plain_tokens = (
            getattr(tokenizer, "is_fast", False)
            and tokenizer.padding_side == "right"
            and tokenizer.pad_token_id is not None
            and tokenizer.model_max_length == model.max_seq_length
            and set(tokenizer.model_input_names) in _INPUTS
        )
        if not (reads_text and plain_tokens and pooling.include_prompt and model.truncate_dim is None):
            return None
        return cls(model)

    @property
    def budgets(self) -> tuple[int, ...]:
        """Tokens of a batch that are worth a try on this device, the default first."""
        return BUDGETS.get(self._device.type, BUDGETS["cpu"])

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", whole: bool = False) -> list[Tokens]:
        """The tokens of each text with a prompt in front; may be called in any thread.

        Args:
            whole: also of what is longer than the model reads, which is cut off otherwise.
        """
        encoded = (self._whole if whole else self._cut).encode_batch([prompt + text for text in texts])
        if self._typed:
            return [np.asarray([text.ids, text.type_ids], dtype=np.int64) for text in encoded]
        return [np.asarray([text.ids], dtype=np.int64) for text in encoded]

    def encode(
        self, tokens: Sequence[Tokens], *, precision: Precision = "fp32", batch_tokens: int | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors, float32 (len(tokens), R); batches are of texts of about one length.

        Args:
            precision: of the model's weights and activations; pooling is float32 in any case.
            batch_tokens: in a batch, padding included; what suits the device if None.
        """
        torch = import_torch()
        transformer = self._transformer(precision)
        vectors: NDArray[np.float32] | None = None
        with torch.inference_mode():
            for batch in length_batches([text.shape[1] for text in tokens], batch_tokens or self.budgets[0]):
                part = self._forward(transformer, self._features([tokens[i] for i in batch]))
                if vectors is None:
                    vectors = np.empty((len(tokens), part.shape[1]), dtype=np.float32)
                vectors[batch] = part
        return np.zeros((0, 0), dtype=np.float32) if vectors is None else vectors

    def release_bf16(self) -> None:
        """Give back the memory of the weights in bf16."""
        self._transformers.pop("bf16", None)

    def _transformer(self, precision: Precision) -> Any:
        if precision not in self._transformers:
            torch = import_torch()
            self._transformers[precision] = copy.deepcopy(self._transformers["fp32"]).to(torch.bfloat16)
        return self._transformers[precision]

    def _features(self, batch: Sequence[Tokens]) -> dict[str, Any]:
        """A batch of B texts as the transformer takes it, padded to the longest, T."""
        torch = import_torch()
        B, T = len(batch), max(text.shape[1] for text in batch)
        parts_2BT = np.empty((2, B, T), dtype=np.int64)
        parts_2BT[0], parts_2BT[1] = self._padding
        mask_BT = np.zeros((B, T), dtype=np.int64)
        for b, text in enumerate(batch):
            parts_2BT[: text.shape[0], b, : text.shape[1]] = text
            mask_BT[b, : text.shape[1]] = 1
        made = {"input_ids": parts_2BT[0], "attention_mask": mask_BT}
        if self._typed:
            made["token_type_ids"] = parts_2BT[1]
        return {**{name: torch.from_numpy(x).to(self._device) for name, x in made.items()}, "modality": "text"}

    def _forward(self, transformer: Any, features: dict[str, Any]) -> NDArray[np.float32]:
        torch = import_torch()
        features = transformer(features)
        features["token_embeddings"] = features["token_embeddings"].float()
        for module in self._rest:
            features = module(features)
        made: NDArray[np.float32] = torch.nn.functional.normalize(features["sentence_embedding"], dim=1).cpu().numpy()
        return made


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group positions, longest first, so that (texts in a batch) x (its longest) stays within ``budget`` tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
