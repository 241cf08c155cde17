"""The choice of precision and batch: by speed and by cosine, made once, and kept by whatever goes on with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stub_encoder import StubEncoder
from tiny import WORDS, save_tiny_encoder

from ragmoe import ConfigError
from ragmoe.index import BuildOptions, Index, Manifest, _crash, blocks, build_index, plan_add, plan_build, plan_merge
from ragmoe.index import calibrate as calibration
from ragmoe.index import plan as plans
from ragmoe.index.calibrate import Calibration, calibrate, described
from ragmoe.index.encoder import SentenceEncoder
from ragmoe.index.manifest import EncodingRecord, commit, read_manifest, write_manifest
from ragmoe.index.tokens import TokenEncoder

BF16 = EncodingRecord(precision="bf16", batch_tokens=777, chosen="calibrated", speed=1.8, cosine=0.9998)


class Timed:
    """Takes as long as it is told to, by a clock of its own."""

    budgets = (2048, 4096, 1024)

    def __init__(self, speeds: dict[tuple[str, int], float], cosine: float) -> None:
        self.speeds, self.cosine, self.now = speeds, cosine, 0.0
        self.released = False

    def encode(self, tokens: Sequence[Any], *, precision: str, batch_tokens: int) -> Any:
        self.now += sum(text.shape[1] for text in tokens) / self.speeds.get((precision, batch_tokens), 1e5)
        angle = np.arccos(self.cosine) if precision == "bf16" else 0.0
        return np.tile(np.asarray([[np.cos(angle), np.sin(angle)]]), (len(tokens), 1))

    def release_bf16(self) -> None:
        self.released = True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Calibration, Timed]]:
    def run(speeds: dict[tuple[str, int], float], cosine: float = 1.0, **options: Any) -> tuple[Calibration, Timed]:
        encoder = Timed(speeds, cosine)
        monkeypatch.setattr(calibration, "perf_counter", lambda: encoder.now)
        tokens = [np.zeros((1, n), dtype=np.int64) for n in (10, 50, 100, 200) for _ in range(100)]
        return calibrate(encoder, tokens, **options), encoder  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize(
    ("speed", "cosine", "expected"),
    [(1.8, 0.9998, "bf16"), (1.8, 0.998, "fp32"), (1.1, 0.9998, "fp32"), (0.6, 0.9998, "fp32")],
)
def test_bf16_must_be_faster_and_the_same(run: Any, speed: float, cosine: float, expected: str) -> None:
    found, encoder = run({("bf16", 2048): speed * 1e5}, cosine)
    assert found.record == EncodingRecord(
        precision=expected, batch_tokens=2048, chosen="calibrated", speed=speed, cosine=cosine
    )
    assert encoder.released == (expected == "fp32")
    assert found.tokens_per_second == pytest.approx(1e5 * (speed if expected == "bf16" else 1))
    assert f"bf16 is {speed:.2f} times as fast as float32" in described(found.record)


@pytest.mark.parametrize(("speed", "expected"), [(1.5, 1024), (1.02, 2048), (0.5, 2048)])
def test_another_batch_must_be_faster_by_a_margin(run: Any, speed: float, expected: int) -> None:
    found, _ = run({("fp32", 1024): speed * 1e5})
    assert found.record.batch_tokens == expected
    # What is asked for is not measured.
    assert run({("fp32", 1024): speed * 1e5}, batch_tokens=99)[0].record.batch_tokens == 99
    assert run({("bf16", 2048): 9e5}, precision="fp32")[0].record.speed is None


def test_a_slow_encoder_is_not_measured_for_long(run: Any) -> None:
    slow = dict.fromkeys([(kind, size) for kind in ("fp32", "bf16") for size in Timed.budgets], 1e3)
    assert run(slow)[1].now < 10  # of 2048 tokens, once to warm up and once to time, in both precisions


def test_a_processor_without_bf16_is_not_waited_for(run: Any) -> None:
    found, encoder = run({("bf16", 2048): 1e3})  # a hundredth of float32's rate
    assert found.record.precision == "fp32" and found.record.speed == 0.01 and encoder.released
    # 2,048 tokens alone would take it two seconds, and they are encoded twice.
    assert encoder.now < 0.5


def test_one_hiccup_does_not_rule_bf16_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = Timed.encode, []

    def interrupted(self: Timed, tokens: Any, *, precision: str, batch_tokens: int) -> Any:
        calls.append(precision)
        # The first that is timed, after one that is not.
        self.now += 60.0 if precision == "bf16" and calls.count("bf16") == 2 else 0.0
        return encode(self, tokens, precision=precision, batch_tokens=batch_tokens)

    monkeypatch.setattr(Timed, "encode", interrupted)
    found, _ = run({("bf16", 2048): 1.8e5})
    assert found.record.precision == "bf16" and found.record.speed == 1.8


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SentenceEncoder:
    return SentenceEncoder("tiny", save_tiny_encoder(tmp_path_factory.mktemp("model")))


@pytest.fixture
def world(tmp_path: Path, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Builds of 12 passages, in blocks of five, worth a calibration; ``used`` is what each block was encoded with."""
    world = SimpleNamespace(out=tmp_path / "index", used=[], calibrated=0, encoder=encoder)

    def source(name: str, words: Sequence[str]) -> str:
        lines = [{"id": f"{name}{i}", "text": f"the {word} of the {name}"} for i, word in enumerate(words)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / f"{name}.jsonl")

    def build(*sources: str, **options: Any) -> Manifest:
        return build_index(BuildOptions(**{"sources": sources, "out": world.out, "encoder": encoder, **options}))

    def found(*_: Any, **__: Any) -> Calibration:
        world.calibrated += 1
        return Calibration(BF16, 1e4)

    encode = TokenEncoder.encode

    def watched(self: TokenEncoder, tokens: Any, *, precision: Any = "fp32", batch_tokens: Any = None) -> Any:
        world.used.append((precision, batch_tokens))
        return encode(self, tokens, precision=precision, batch_tokens=batch_tokens)

    monkeypatch.setattr(blocks, "BLOCK", 5)
    monkeypatch.setattr(plans, "FEWEST", 10)
    monkeypatch.setattr(plans, "calibrate", found)
    monkeypatch.setattr(TokenEncoder, "encode", watched)
    world.source, world.build = source, build
    world.city, world.law = source("city", WORDS.split()[:12]), source("law", WORDS.split()[:3])
    return world


def test_what_was_chosen_is_used_recorded_and_kept_by_changes(world: SimpleNamespace, encoder: SentenceEncoder) -> None:
    manifest = world.build(world.city)
    assert manifest.encoding == BF16 and world.used == [("bf16", 777)] * 3
    assert Index.open(world.out, encoder=encoder).search(["the zebra of the city"], 1, retriever="dense")
    assert world.used.pop() == ("fp32", None)
    plan = plan_add(world.out, [world.law], encoder=encoder)
    # The precision is the index's, the size of a batch that of the machine that adds.
    own = encoder.by_tokens.budgets[0]
    assert plan.run().encoding == BF16.model_copy(update={"batch_tokens": own}) and world.used[3:] == [("bf16", own)]
    # Built over: what is known stays, so what is new is encoded like it.
    again = world.build(world.city, world.law, world.source("bank", ["open"]), overwrite=True)
    assert again.encoding.precision == "bf16" and world.used[4:] == [("bf16", own)] and world.calibrated == 1
    # Asked for something else, all is encoded anew.
    other = world.build(world.city, overwrite=True, precision="fp32", batch_tokens=64)
    assert other.encoding == EncodingRecord(precision="fp32", batch_tokens=64, chosen="asked")
    assert world.used[5:] == [("fp32", 64)] * 3 and world.calibrated == 1


def test_what_is_built_over_an_index_of_before_is_encoded_like_it(world: SimpleNamespace) -> None:
    """An older manifest does not say with what precision, which was float32: two kinds of vectors must not mix."""
    world.build(world.city, precision="fp32", batch_tokens=64)
    old = read_manifest(world.out)
    write_manifest(world.out, old.model_copy(update={"encoding": None}).sealed())
    commit(world.out)
    new = world.source("bank", WORDS.split()[:11])
    manifest = world.build(world.city, new, overwrite=True)
    assert manifest.encoding is not None and manifest.encoding.precision == "fp32"
    assert world.calibrated == 0 and {precision for precision, _ in world.used} == {"fp32"}
    # Of 23 passages in five blocks, those of the first two are known.
    assert len(world.used) == 3 + 3


def test_a_build_that_goes_on_does_not_choose_again(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(point: str) -> None:
        if point == "block" and len(world.used) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(_crash, "hook", die)
    with pytest.raises(KeyboardInterrupt):
        world.build(world.city)
    monkeypatch.setattr(_crash, "hook", None)
    # Two of three blocks are encoded, and the time that is left is a third.
    asked = BuildOptions((world.city,), world.out, encoder=world.encoder, resume=True)
    plan = replace(plan_build(asked), passage_seconds=1.0)
    assert plan.seconds == pytest.approx(12 / 3)
    assert replace(plan, target=replace(plan.target, resume=False)).seconds == pytest.approx(12)
    # With another precision nothing is taken over.
    other = replace(plan_build(replace(asked, precision="fp32", batch_tokens=64)), passage_seconds=1.0)
    assert other.missing is None and other.seconds == pytest.approx(12)
    # Blocks 0 and 2 are one process's, 1 is the other's; of the last alone nothing is shared out.
    assert other.seconds_of(2) == pytest.approx(8) and plan.seconds_of(2) == pytest.approx(4)
    manifest = world.build(world.city, resume=True, batch_tokens=99)
    assert manifest.encoding == BF16.model_copy(update={"batch_tokens": 99})
    assert world.calibrated == 1 and world.used == [*[("bf16", 777)] * 2, ("bf16", 99)]
    # And finished, it is not built again.
    assert world.build(world.city, resume=True) == read_manifest(world.out) and len(world.used) == 3


def test_few_passages_are_not_measured(world: SimpleNamespace, encoder: SentenceEncoder) -> None:
    manifest = world.build(world.law)
    assert manifest.encoding == EncodingRecord(precision="fp32", batch_tokens=2048, chosen="default")
    assert world.calibrated == 0 and "not calibrated: fewer than" in described(manifest.encoding)


def test_the_estimate_comes_from_the_calibration(world: SimpleNamespace, encoder: SentenceEncoder) -> None:
    plan = plan_build(BuildOptions((world.city,), world.out, encoder=encoder))
    tokens = sum(len(spans) + 2 for spans in encoder.token_spans([p.text for p in plan.contents.sample]))
    assert plan.seconds == pytest.approx(tokens / 1e4) and world.used == []


def test_merging_two_precisions_records_the_lower(world: SimpleNamespace, encoder: SentenceEncoder) -> None:
    other = world.out.parent / "other"
    world.build(world.law, precision="fp32", out=other)
    world.build(world.city)
    merged = plan_merge(other, world.out, world.out.parent / "merged").run()
    assert merged.encoding == BF16


def test_encoders_of_ones_own_offer_no_choice_and_older_manifests_stay_whole(world: SimpleNamespace) -> None:
    manifest = world.build(world.city, encoder=StubEncoder())
    content = json.loads((world.out / "manifest.json").read_text())
    assert manifest.encoding is None and "encoding" not in content
    assert read_manifest(world.out).digest == content["digest"]
    with pytest.raises(ConfigError, match="offers no choice of precision"):
        world.build(world.city, encoder=StubEncoder(), overwrite=True, precision="bf16")
