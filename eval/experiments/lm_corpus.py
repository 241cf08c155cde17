"""What the experiments with language models begin with, beside their data: a sixth domain, passages, a random Llama.

    python eval/experiments/lm_corpus.py --data DIR [--out runs/lm]

DIR holds a folder for each of the domains legal, fiction, webdocs, devops and textbook, with train.jsonl and
valid.jsonl, a document a line. The sixth is code: the standard library of the Python that runs this, without its tests
and its tables. Written to the output folder:

- ``code/train.jsonl`` and ``code/valid.jsonl``;
- ``datastore.jsonl``, the documents that neighbours are taken from, a quarter of those that are learned from;
- ``start/``, a byte-pair tokenizer learned from the train documents of all six, and a Llama with random weights.

A second run writes the same again. Takes about a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOMAINS = ("legal", "fiction", "webdocs", "devops", "textbook")
WORDS = 4096
# As large as each of the other domains, in bytes.
TRAIN_BYTES, VALID_BYTES = 7_360_000, 320_000
# One document in so many is indexed.
STORED = 4
# Tests are not what a program reads like, and tables of characters and help texts are no code.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SMALLEST, LARGEST = 2_000, 120_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("RAGMOE_DATA"), help="default: RAGMOE_DATA")
    parser.add_argument("--out", type=Path, default=Path("runs/lm"))
    arguments = parser.parse_args()
    if arguments.data is None or not (arguments.data / DOMAINS[0] / "train.jsonl").is_file():
        sys.exit(
            f"error: --data is {arguments.data}: expected a folder with {', '.join(DOMAINS)}, each with train.jsonl "
            "and valid.jsonl\nhint: name it with --data DIR or RAGMOE_DATA=DIR"
        )
    write_code(arguments.out / "code")
    files = [arguments.data / domain / "train.jsonl" for domain in DOMAINS] + [arguments.out / "code" / "train.jsonl"]
    write_datastore(arguments.out / "datastore.jsonl", files)
    write_start(arguments.out / "start", files)


def write_code(folder: Path) -> None:
    """The domain of code: modules of the standard library, split by a digest of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    room = {"valid": VALID_BYTES, "train": TRAIN_BYTES}
    lines: dict[str, list[str]] = {"valid": [], "train": []}
    for name, text in sorted(modules(), key=lambda module: hashlib.sha256(module[0].encode()).hexdigest()):
        split = "valid" if room["valid"] > 0 and len(text) <= 40_000 else "train"
        if room[split] <= 0:
            continue
        room[split] -= len(text.encode())
        source = f"CPython {platform.python_version()}"
        record = {"id": f"code-{name}", "title": name, "text": text, "domain": "code", "source": source}
        lines[split].append(json.dumps(record, ensure_ascii=False) + "\n")
    for split, records in lines.items():
        (folder / f"{split}.jsonl").write_text("".join(records), encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(records)} modules, {sum(map(len, records)) / 1e6:.2f} MB")


def modules() -> Iterator[tuple[str, str]]:
    """Names and texts of the standard library's modules, without those that are too short, too long or copies."""
    root, seen = Path(sysconfig.get_paths()["stdlib"]), set()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if LEFT_OUT & set(place.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if SMALLEST <= len(text) <= LARGEST and text not in seen:
            seen.add(text)
            yield place.as_posix(), text


def write_datastore(path: Path, files: list[Path]) -> None:
    """What neighbours are taken from: every fourth document that is learned from, by a digest of its id."""
    kept = 0
    with path.open("w", encoding="utf-8") as out:
        for line in (line for file in files for line in file.open(encoding="utf-8")):
            if int(hashlib.sha256(json.loads(line)["id"].encode()).hexdigest(), 16) % STORED == 0:
                out.write(line)
                kept += 1
    print(f"{path}: {kept} documents, {path.stat().st_size / 1e6:.2f} MB")


def write_start(folder: Path, files: list[Path]) -> None:
    """A byte-pair tokenizer and a Llama of five million parameters, drawn at random."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator((text for file in files for text in texts(file)), trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens, {model.num_parameters() / 1e6:.2f} M parameters")


def texts(file: Path) -> Iterator[str]:
    """The documents of a file."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            record: dict[str, Any] = json.loads(line)
            yield record["text"]


if __name__ == "__main__":
    main()
