"""How passages are encoded: the precision of the weights and the size of a batch, by a short measurement.

Some seconds over real passages decide what a build of hours is done with. bf16 is taken only where it is faster by a
margin and its vectors are those of float32 but for rounding; it is where the processor multiplies it (AMX), and is
not where it only converts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import ConfigError
from ragmoe.index.encoder import Encoder, token_encoder
from ragmoe.index.manifest import EncodingRecord
from ragmoe.index.tokens import Precision, TokenEncoder, Tokens

#: What may be asked for.
Asked = Literal["auto", "fp32", "bf16"]
#: Fewer passages to encode are not worth a calibration.
FEWEST = 500
#: bf16 must be so many times as fast as float32, and the mean cosine of its vectors at least so high.
FASTER, COSINE = 1.15, 0.999
# Another batch size than the default must be so many times as fast: less is the noise of the measurement.
_BETTER = 1.05
_SECONDS = 2.0
_ROUNDS = 3
# Over so many tokens of one text bf16 has to show that it is worth a measurement: a processor that does not know it
# takes a hundred times as long, minutes for what float32 does in a second.
_GLANCE, _HOPELESS = 16, 0.25


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found, and the tokens a second that it makes expect."""

    record: EncodingRecord
    tokens_per_second: float


def asked_record(encoder: Encoder, precision: Asked, batch_tokens: int | None) -> EncodingRecord | None:
    """How passages are encoded where nothing is measured; None for an encoder that offers no choice.

    Raises:
        ConfigError: something was asked for that the encoder cannot do.
    """
    model = token_encoder(encoder)
    if model is None:
        if precision != "auto" or batch_tokens is not None:
            raise ConfigError(
                f"encoder {encoder.id!r} is run by its own code, which offers no choice of precision or batch",
                hint="leave out --precision and --batch-tokens",
            )
        return None
    if batch_tokens is not None and batch_tokens < 1:
        raise ConfigError(f"a batch of {batch_tokens} tokens was asked for; expected at least 1")
    chosen: Literal["default", "asked"] = "default" if precision == "auto" and batch_tokens is None else "asked"
    return EncodingRecord(
        precision="fp32" if precision == "auto" else precision,
        batch_tokens=batch_tokens or model.budgets[0],
        chosen=chosen,
    )


def calibrate(
    encoder: TokenEncoder, tokens: Sequence[Tokens], *, precision: Asked = "auto", batch_tokens: int | None = None
) -> Calibration:
    """Choose what was left open, over the tokens of some passages."""
    start, size = perf_counter(), batch_tokens or encoder.budgets[0]
    part = _about(tokens, size)
    found: dict[str, float] = {}
    kinds: tuple[Precision, ...] = ("fp32", "bf16") if precision == "auto" else (precision,)
    speed = cosine = None
    if precision == "auto" and (glance := _glance(encoder, part[-1][:, :_GLANCE], size))[0] < _HOPELESS:
        speed, cosine = glance
        kinds = ("fp32",)
    vectors = {kind: encoder.encode(part, precision=kind, batch_tokens=size) for kind in kinds}
    for _ in range(_ROUNDS):
        for kind in kinds:
            found[kind] = max(found.get(kind, 0.0), _rate(encoder, part, kind, size))
        # The other half of the time is for the size of a batch.
        if perf_counter() - start > _SECONDS / 2:
            break
    best: Precision = kinds[0]
    if len(kinds) == 2:
        speed = round(found["bf16"] / found["fp32"], 3)
        cosine = _cosine(vectors["fp32"], vectors["bf16"])
        best = "bf16" if speed >= FASTER and cosine >= COSINE else "fp32"
    if precision == "auto" and best == "fp32":
        encoder.release_bf16()
    rate = found[best]
    if batch_tokens is None:
        size, rate = _batch(encoder, tokens, best, rate, start + _SECONDS)
    record = EncodingRecord(precision=best, batch_tokens=size, chosen="calibrated", speed=speed, cosine=cosine)
    return Calibration(record, rate)


def described(record: EncodingRecord) -> str:
    """A record as people read it."""
    how = {"asked": "as asked", "default": f"not calibrated: fewer than {FEWEST} passages"}.get(record.chosen)
    if record.speed is not None and record.cosine is not None:
        how = f"calibrated: bf16 is {record.speed:.2f} times as fast as float32, mean cosine {record.cosine:.4f}"
    return f"{record.precision}, {record.batch_tokens:,} tokens a batch ({how or 'calibrated'})"


def _glance(encoder: TokenEncoder, text: Tokens, batch_tokens: int) -> tuple[float, float]:
    """How many times as fast bf16 is over a short text, and the cosine of its vector: rough, but soon known.

    The best of three where it is slow: something else may have had the processor meanwhile.
    """
    kinds: tuple[Precision, ...] = ("fp32", "bf16")
    vectors = [encoder.encode([text], precision=kind, batch_tokens=batch_tokens) for kind in kinds]
    fp32, bf16 = (_rate(encoder, [text], kind, batch_tokens) for kind in kinds)
    for _ in range(_ROUNDS - 1):
        if bf16 < _HOPELESS * fp32:
            bf16 = max(bf16, _rate(encoder, [text], "bf16", batch_tokens))
    return round(bf16 / fp32, 3), _cosine(*vectors)


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The mean cosine of unit vectors (B, R)."""
    return round(float((a * b).sum(axis=1).mean()), 5)


def _batch(
    encoder: TokenEncoder, tokens: Sequence[Tokens], precision: Precision, rate: float, end: float
) -> tuple[int, float]:
    """The size of a batch and its rate: the default's, unless another is better; those for which there is time."""
    default, *others = encoder.budgets
    rates = {default: rate}
    for size in others:
        part = _about(tokens, max(size, default))
        if perf_counter() + _count(part) / rate > end:
            continue
        rates[size] = _rate(encoder, part, precision, size)
    best = max(rates, key=lambda size: rates[size] * (_BETTER if size == default else 1))
    return best, rates[best]


def _about(tokens: Sequence[Tokens], total: int) -> list[Tokens]:
    """Texts of all lengths alike, with about so many tokens in all."""
    by_length = sorted(tokens, key=lambda text: text.shape[1])
    count = min(len(by_length), max(int(total * len(by_length) / _count(by_length)), 1))
    return [by_length[i] for i in np.linspace(0, len(by_length) - 1, count).round().astype(int)]


def _count(tokens: Sequence[Tokens]) -> int:
    return sum(text.shape[1] for text in tokens)


def _rate(encoder: TokenEncoder, tokens: Sequence[Tokens], precision: Precision, batch_tokens: int) -> float:
    """Tokens a second, padding not counted."""
    start = perf_counter()
    encoder.encode(tokens, precision=precision, batch_tokens=batch_tokens)
    return _count(tokens) / max(perf_counter() - start, 1e-9)
