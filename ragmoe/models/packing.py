"""A bundle as what it adds to a public base: small enough to ship, unpacked to an ordinary bundle where it is used.

    packed.safetensors   fp16: gates, experts, head, and NAME.a, NAME.b whose product is added to the base's NAME
    packed.json          the base, the configuration, the experts' names, and the sha256 of the other file

Only rounding to fp16 is lost: a matrix that was trained by low-rank adapters differs from its base by a matrix of their
rank, and one that has changed by more is refused.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from ragmoe._errors import BundleError
from ragmoe._folders import share
from ragmoe.bundle import THRESHOLDS, EncoderRef, is_bundle, read_bundle
from ragmoe.bundle._files import file_digest
from ragmoe.models.bert import RagmoeBertForQuestionAnswering
from ragmoe.models.config import RagmoeBertConfig
from ragmoe.models.upcycling import base_path, dense_source

TENSORS_NAME = "packed.safetensors"
ABOUT_NAME = "packed.json"
# Of a matrix's change, what may be lost to the rank; half-precision rounding loses about 3e-4.
_LOST_AT_MOST = 1e-3


class Packed(BaseModel):
    """What ``packed.json`` says.

    Attributes:
        base: ``minilm`` or a Hub id; ``base_digest`` is the sha256 of its encoder's weights.
        digest: sha256 of ``packed.safetensors``.
        experts: their ids with their names, in the order in which their tensors are stacked.
        extra: what else the bundle's map recorded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    base: str
    base_digest: str
    digest: str
    experts: dict[int, str]
    encoder: EncoderRef | None = None
    index: str | None = None
    config: dict[str, Any]
    # The matrices of the base that are given by low-rank deltas; None in files older than it, whose names tell.
    deltas: list[str] | None = None
    extra: dict[str, Any] = {}


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a packed bundle."""
    return (Path(folder) / ABOUT_NAME).is_file()


def pack(bundle: str | os.PathLike[str], out: str | os.PathLike[str], *, base: str = "minilm", rank: int = 64) -> int:
    """Write what a bundle adds to its base, in fp16; returns the bytes written.

    Args:
        rank: of the deltas on the base's matrices, the sum of the ranks of all adapters that were merged into them.

    Raises:
        BundleError: a matrix has changed by more than the rank can say, or the bundle is no reader, of another base or
            in another precision.
    """
    state, map_ = read_bundle(Path(bundle), verify=True)
    if (kind := map_.extra.get("config", {}).get("model_type")) != RagmoeBertConfig.model_type:
        raise BundleError(
            f"{bundle} is a {kind!r} model; readers ({RagmoeBertConfig.model_type!r}) alone can be packed"
        )
    original, digest = _base_tensors(base)
    if not original.keys() & state.keys():
        raise BundleError(f"{bundle} does not come from {base}: it has none of its tensors")
    deltas: list[str] = []
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in original:
            packed[name] = tensor
        elif original[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in {bundle}, {tuple(original[name].shape)} in {base}"
            raise BundleError(f"{bundle} does not come from {base}: {name} is {shapes}")
        elif tensor.dtype != original[name].dtype:
            raise BundleError(
                f"{bundle} is saved in {tensor.dtype}, which has rounded every matrix of its base: expected "
                f"{original[name].dtype}, as {base} has them",
                hint="pack it as training leaves it, in float32",
            )
        elif not torch.equal(tensor, original[name]):
            packed |= (delta := _delta(name, tensor, original[name], rank))
            deltas += [name] if name not in delta else []
    extra = dict(map_.extra)
    # Where it was trained is nobody's business, and says nothing elsewhere.
    config = {**extra.pop("config"), "dtype": "float32", "_name_or_path": ""}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: x.half().contiguous() if x.is_floating_point() else x for name, x in packed.items()}
    save_file(halves, folder / TENSORS_NAME, metadata={"format": "pt"})
    share(folder / TENSORS_NAME)
    about = Packed(
        base=base,
        base_digest=digest,
        digest=file_digest(folder / TENSORS_NAME),
        experts={expert.id: expert.name for expert in map_.experts},
        encoder=map_.encoder,
        index=map_.index,
        config=config,
        deltas=deltas,
        extra=extra,
    )
    (folder / ABOUT_NAME).write_text(about.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in (TENSORS_NAME, ABOUT_NAME))


def unpack(packed: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Make an ordinary bundle of a packed one; it appears when it is whole.

    Raises:
        BundleError: a file is missing or damaged, the base is not the one it was packed for, or ``out`` exists.
    """
    folder = Path(out)
    if folder.exists():
        raise BundleError(f"{folder} exists: expected a new folder", hint="give another folder, or remove it")
    about = read_about(packed)
    tensors = _tensors(Path(packed), about)
    base, digest = _base_tensors(about.base)
    if digest != about.base_digest:
        raise BundleError(
            f"{packed} adds to the weights {about.base_digest[:12]} of {about.base}, but here they are {digest[:12]}"
        )
    config = RagmoeBertConfig.from_dict(dict(about.config))
    if about.experts:
        config.experts = len(about.experts)
        config.expert_ids, config.expert_names = map(list, zip(*about.experts.items(), strict=True))
        own = about.extra.get(THRESHOLDS)
        config.expert_thresholds = [own.get(str(id)) for id in config.expert_ids] if own else None
    config.encoder = about.encoder.model_dump() if about.encoder else None
    config.index_digest = about.index
    model = RagmoeBertForQuestionAnswering(config)
    state = {name: base[name] for name in model.state_dict() if name in base}
    deltas = about.deltas
    if deltas is None:
        deltas = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    factors = {f"{name}.{factor}" for name in deltas for factor in "ab"}
    state |= {name: x for name, x in tensors.items() if name not in factors}
    for name in deltas:
        state[name] = (base[name].double() + tensors[f"{name}.a"].double() @ tensors[f"{name}.b"].double()).float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise BundleError(f"{packed} does not fit its model: missing {missing[:5]}, unexpected {unexpected[:5]}")
    _publish(model.eval(), about, folder)
    return folder


def read_about(packed: str | os.PathLike[str]) -> Packed:
    """What a packed bundle says of itself; BundleError where it is none."""
    path = Path(packed) / ABOUT_NAME
    try:
        return Packed.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{packed} is no packed bundle: {error}", hint="ragmoe bundle pack BUNDLE --out DIR writes one"
        ) from None


def _tensors(folder: Path, about: Packed) -> dict[str, Tensor]:
    path = folder / TENSORS_NAME
    if not path.is_file() or file_digest(path) != about.digest:
        raise BundleError(f"{path} is damaged or missing: its sha256 is not what {ABOUT_NAME} says")
    return {name: x.float() if x.is_floating_point() else x for name, x in load_file(path).items()}


def _publish(model: RagmoeBertForQuestionAnswering, about: Packed, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_path(about.base))
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as part:
        # A temporary folder is its maker's alone, and files are as readable as the folder they are written to.
        os.chmod(part, _folder_mode())
        tokenizer.save_pretrained(part)
        model.save_pretrained(part, message=f"unpack {about.digest[:12]}", extra=about.extra)
        try:
            os.rename(part, folder)
        except OSError:
            # Somebody else was faster; what they made is the same.
            if not is_bundle(folder):
                raise
        else:
            # For the context manager, which removes it.
            Path(part).mkdir()


def _folder_mode() -> int:
    """What a folder that anybody makes may be read by: there is no other way to ask for it than to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _base_tensors(base: str) -> tuple[dict[str, Tensor], str]:
    """The encoder's tensors under the reader's names, and the sha256 of them all."""
    _, dense = dense_source(base_path(base))
    tensors = {f"bert.{name}": tensor for name, tensor in sorted(dense.state_dict().items())}
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return tensors, digest.hexdigest()


def _delta(name: str, tensor: Tensor, original: Tensor, rank: int) -> dict[str, Tensor]:
    if tensor.dim() != 2:
        return {name: tensor}
    change = tensor.double() - original.double()
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    lost = float(s[rank:].norm() / s.norm())
    if lost > _LOST_AT_MOST:
        raise BundleError(
            f"{name} has changed by a matrix of a higher rank than {rank}: {lost:.1%} of it would be lost",
            hint="train with train.what: lora, and give the sum of the adapters' ranks",
        )
    root = s[:rank].sqrt()
    return {f"{name}.a": (u[:, :rank] * root).float(), f"{name}.b": (root.unsqueeze(1) * v[:rank]).float()}
