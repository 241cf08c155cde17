"""Building and searching an index, against sentence-transformers and raw FAISS on the same cores.

    python eval/bench/index.py --data DIR [--passages 700] [--vectors 20000 1000000] [--json FILE] [--only REGEX]

- encode: passages a second of ours (tokenize and encode, as calibrated) against `SentenceTransformer.encode` as its
  users call it: same model and maximum length, float32, batches of 32, all passages in memory, a process of its own.
- build: read, tokenize, encode, write, index against that same encode alone. At least 2.5 times on a CPU with AMX.
- processes: the build command by torchrun, a process a core, against the same command with a thread a core.
- quality: mean and lowest cosine to those float32 vectors, and R@20 of the dev questions by both.
- search, over made-up vectors around the real ones: a batch of queries, one query with ids, scores and embeddings, one
  with texts as well, each against raw FAISS on the same index (finding as many candidates as are ranked again, where it
  holds codes in the place of vectors, and not ranking them); and opening it, the first search and the first passage
  by its id in fresh processes, with the memory that each adds.
- on a GPU: tokens a second against sentence-transformers' own bf16 with the best of its batch sizes.

What it does not do: other FAISS types, or sizes, than the automatic ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _index_cases import MadeUp, Theirs, has_amx, made_up_lines, sample, theirs
from _result import row, table, write_result
from _retrieval_data import Remembering, data_folder, dev_questions, recalls
from _timing import Clock, chosen

from ragmoe import Index
from ragmoe._memory import keep_freed_memory
from ragmoe._threads import available_threads
from ragmoe.corpus import Passage, Question
from ragmoe.index import BuildOptions, build_index, load_encoder
from ragmoe.index.calibrate import calibrate, described
from ragmoe.index.encoder import Encoder, encoder_folder, token_encoder
from ragmoe.index.manifest import EncodingRecord
from ragmoe.index.tokens import TokenEncoder
from ragmoe.index.windows import encode_prepared, encoder_text, prepare_passages

K = 16
QUERIES = 256
THEIR_BATCHES = (32, 128, 512, 1024)
NOTES = """
Passages longer than the encoder reads are cut at a word, up to four tokens before where sentence-transformers does,
and MiniLM's vector of such a passage hangs on its last tokens: that is where the lower cosines are.

The ONNX and OpenVINO backends of sentence-transformers are left out: they need optimum-onnx (0.1.0: transformers below
4.58) or optimum-intel (2.2.0: below 5.6), and ragmoe needs 5.23 or newer.
"""
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder a domain (or RAGMOE_DATA)")
    parser.add_argument("--passages", type=int, default=700, help="a sample across the seven core domains")
    parser.add_argument("--vectors", type=int, nargs="+", default=[20_000], help="in the indexes that are searched")
    parser.add_argument("--encoder", default="minilm", help="its name or folder")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed at most")
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases to run: encode, processes, search, gpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result is written, with a .md beside it")
    arguments = parser.parse_args()
    data = data_folder(arguments.data)
    keep_freed_memory()
    passages, questions = sample(data, dev_questions(data), arguments.passages)
    encoder = load_encoder(arguments.encoder)
    model = token_encoder(encoder)
    if model is None:
        sys.exit(f"error: encoder {encoder.id!r} is run by sentence-transformers itself: there is nothing to compare")
    prompt = encoder.prompts["passage"]
    record = calibrate(model, model.tokenize([encoder_text(p) for p in passages], prompt=prompt)).record
    print(f"encoding: {described(record)}", file=sys.stderr)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, theirs(encoder_folder(arguments.encoder)) as baseline:
        bench = Bench(Path(folder), passages, questions, encoder, record, arguments.rounds)
        if chosen("encode, build, quality", arguments.only):
            rows += bench.encode(baseline)
        if available_threads() > 1 and chosen("processes", arguments.only):
            rows += bench.processes()
        if chosen("search, open", arguments.only):
            for vectors in arguments.vectors:
                rows += bench.search(vectors)
        if torch.cuda.is_available() and chosen("gpu", arguments.only):
            rows += gpu_rows(baseline, model, passages, record)
    cells = [
        [r["case"], r["metric"], *(_cell(r[key]) for key in ("value", "baseline", "ratio", "target"))] for r in rows
    ]
    gpu = "" if torch.cuda.is_available() else "No GPU is here: its row is left out.\n"
    headers = ["case", "measured", "ours", "theirs", "ratio", "target"]
    command = " ".join(["python eval/bench/index.py --data DIR --vectors", *map(str, arguments.vectors)])
    text = f"# Building and searching\n\n{len(passages):,} passages; encoding: {described(record)}.\n\n"
    text += f"{table(headers, cells)}\n{gpu}{NOTES}\nMade by `{command}`.\n"
    if arguments.json:
        write_result(arguments.json, "index", rows, text)
    print(text)


class Bench:
    """What is compared on a CPU or wherever the encoder is, over one sample of passages."""

    def __init__(
        self,
        folder: Path,
        passages: Sequence[Passage],
        questions: Sequence[Question],
        encoder: Encoder,
        record: EncodingRecord,
        rounds: int,
    ) -> None:
        self.folder, self.passages, self.questions = folder, passages, questions
        self.encoder, self.record, self.rounds = encoder, record, rounds
        self.prompt = encoder.prompts["passage"]

    def encode(self, baseline: Theirs) -> list[Row]:
        """Encoding and building, by turns with the baseline's encoding, and what became of the vectors."""
        source = self._source()
        texts = [encoder_text(p) for p in self.passages]
        options = BuildOptions(
            sources=(str(source),),
            out=self.folder,
            encoder=self.encoder,
            long_passages="truncate",
            precision=self.record.precision,
            batch_tokens=self.record.batch_tokens,
        )
        kept: dict[str, Any] = {}

        def ours() -> None:
            prepared = prepare_passages(self.passages, self.encoder, mode="truncate", prompt=self.prompt)
            kept["ours"] = encode_prepared(prepared, self.encoder, prompt=self.prompt, how=self.record)
            kept["whole"] = prepared.per_passage == 1

        def build() -> None:
            # Another folder each time, or the vectors would be taken over.
            kept["out"] = self.folder / f"index-{len(list(self.folder.glob('index-*')))}"
            build_index(replace(options, out=kept["out"]))

        def their() -> None:
            kept["theirs"] = baseline.encode(texts, batch_size=32, prompt=self.prompt or None)[0]

        taken = Clock(self.rounds, 240.0).medians({"encode": ours, "build": build, "theirs": their})
        count = len(self.passages)
        rate = {name: count / seconds for name, seconds in taken.items()}
        target = 2.5 if has_amx() else None
        case = f"{count:,} passages, {self.record.precision}"
        rows = [
            row(case, "encode", rate["encode"], baseline=rate["theirs"], target=None, unit="passages/s"),
            row(
                case, "build to encode alone", rate["build"], baseline=rate["theirs"], target=target, unit="passages/s"
            ),
        ]
        cosines = (kept["ours"] * kept["theirs"]).sum(axis=1)
        rows += [
            row(case, "mean cosine", float(cosines.mean()), baseline=1.0, target=0.999, unit="cosine"),
            row(case, "lowest cosine", float(cosines.min()), baseline=1.0, target=None, unit="cosine"),
        ]
        if kept["whole"].any():
            name = f"lowest cosine of the {kept['whole'].sum():,} read whole"
            rows.append(row(case, name, float(cosines[kept["whole"]].min()), baseline=1.0, target=None, unit="cosine"))
        return rows + self._recall(case, Index.open(kept["out"], encoder=self.encoder), kept["theirs"])

    def processes(self) -> list[Row]:
        """The build command by torchrun with a process a core, against one process with a thread a core."""
        source, count = self._source(), len(self.passages)
        words = ["-m", "ragmoe", "index", "build", str(source), "--encoder", self.encoder.id, "--overwrite"]
        words += ["--precision", self.record.precision, "--batch-tokens", str(self.record.batch_tokens)]
        each = ["-m", "torch.distributed.run", "--nproc-per-node", str(available_threads())]

        def build(before: list[str], name: str) -> Callable[[], object]:
            def run() -> None:
                # Another folder each time, or the vectors would be taken over.
                out = Path(tempfile.mkdtemp(dir=self.folder)) / name
                subprocess.run([sys.executable, *before, *words, "--out", str(out)], capture_output=True, check=True)

            return run

        taken = Clock(self.rounds, 240.0).medians({"one": build([], "one"), "each": build(each, "each")})
        case = f"{count:,} passages, {available_threads()} processes to one, the start of Python included"
        return [
            row(case, "build", count / taken["each"], baseline=count / taken["one"], target=None, unit="passages/s")
        ]

    def _source(self) -> Path:
        """The passages in a file."""
        source = self.folder / "corpus.jsonl"
        fields = ("id", "title", "text", "domain", "doc_id")
        _write(source, ({name: getattr(p, name) for name in fields} for p in self.passages))
        return source

    def _recall(self, case: str, index: Index, theirs_PR: np.ndarray) -> list[Row]:
        asked = [question.question for question in self.questions]
        hits = index.search(asked, 20, retriever="dense")
        own = recalls(self.questions, [[hit.passage_id for hit in found] for found in hits])[20]
        order = np.argsort(-(index.encode(asked) @ theirs_PR.T), axis=1, kind="stable")[:, :20]
        exact = recalls(self.questions, [[self.passages[i].id for i in found] for found in order])[20]
        made = row(case, f"R@20 of {len(asked)} questions", own, baseline=exact, target=None)
        return [made | {"target": -0.005, "ok": own - exact >= -0.005}]

    def search(self, vectors: int) -> list[Row]:
        """Searching an index of made-up vectors, against FAISS's own search of the same index."""
        texts = [encoder_text(p) for p in self.passages[: min(512, len(self.passages))]]
        made = MadeUp(self.encoder.encode(texts))
        source, out = self.folder / f"{vectors}.jsonl", self.folder / f"of-{vectors}"
        _write(source, made_up_lines(self.passages, vectors))
        build_index(BuildOptions((str(source),), out, encoder=made))
        index = Index.open(out, encoder=Remembering(made))
        queries = [f"query {n}" for n in range(QUERIES)]
        asked = index.encode(queries)
        raw, searcher = index.faiss.index, index.faiss
        wanted = searcher.candidates(K)
        index.passages(index.passage_ids[:1])

        def with_texts(query: str) -> None:
            index.passages(index.neighbours([query], K, retriever="dense").passage_ids[0])

        some = list(zip(queries, asked, strict=True))[:: QUERIES // 16]
        runs: dict[str, Callable[[], object]] = {
            "raw batch": lambda: raw.search(asked, wanted),
            "batch": lambda: searcher.search(asked, K),
            "raw": lambda: [raw.search(vector[None], wanted) for _, vector in some],
            "embeddings": lambda: [index.neighbours([query], K, retriever="dense") for query, _ in some],
            "texts": lambda: [with_texts(query) for query, _ in some],
        }
        taken = Clock(5 * self.rounds, 60.0).medians(runs)
        again = f", {wanted} candidates" if wanted > K else ""
        case, alone = f"{vectors:,} passages, {index.manifest.faiss.factory}{again}", 1000 * taken["raw"] / len(some)
        rows = [
            row(case, f"search, {QUERIES} queries", QUERIES / taken["batch"], baseline=QUERIES / taken["raw batch"],
                target=0.9, unit="queries/s"),
        ]  # fmt: skip
        for name, limit in (("embeddings", 0.3), ("texts", 2.0)):
            added = 1000 * taken[name] / len(some) - alone
            what = "ids, scores, embeddings" if name == "embeddings" else "texts as well"
            line = row(case, f"one query, {what}: added to raw", added, baseline=alone, target=None, unit="ms")
            rows.append(line | {"target": limit, "ok": added <= limit})
        return rows + self._opened(case, out)

    def _opened(self, case: str, folder: Path) -> list[Row]:
        """Opening and first use, each in a fresh process: the median of several."""
        script = Path(__file__).with_name("_open_case.py")
        runs: list[dict[str, dict[str, float]]] = []
        for _ in range(self.rounds):
            done = subprocess.run(
                [sys.executable, str(script), str(folder)], capture_output=True, text=True, check=True
            )
            runs.append(json.loads(done.stdout))
        rows = []
        for name in runs[0]:
            seconds, held = (median(run[name][what] for run in runs) for what in ("seconds", "bytes"))
            line = row(case, f"{name}, a fresh process", 1000 * seconds, baseline=None, target=None, unit="ms")
            if name == "open":
                line |= {"target": 1000.0, "ok": seconds < 1}
            rows += [line, row(case, f"{name}: memory", held / 1e6, baseline=None, target=None, unit="MB")]
        return rows


def gpu_rows(baseline: Theirs, model: TokenEncoder, passages: Sequence[Passage], record: EncodingRecord) -> list[Row]:
    """Tokens a second on a GPU, against sentence-transformers in bf16 with the best of its batch sizes."""
    texts = [encoder_text(p) for p in passages] * max(20_000 // len(passages), 1)
    total = sum(tokens.shape[1] for tokens in model.tokenize(texts))
    clock = Clock(3, 60.0, "cuda")
    how = {"precision": record.precision, "batch_tokens": record.batch_tokens}
    runs: dict[str, Callable[[], object]] = {"ours": lambda: model.encode(model.tokenize(texts), **how)}  # type: ignore[arg-type]
    for size in THEIR_BATCHES:
        runs[str(size)] = lambda size=size: baseline.encode(texts, batch_size=size, dtype="bfloat16")  # type: ignore[misc]
    taken = clock.medians(runs)
    best = min(THEIR_BATCHES, key=lambda size: taken[str(size)])
    case = f"GPU, {record.precision}, theirs bf16 in batches of {best}"
    return [row(case, "encode", total / taken["ours"], baseline=total / taken[str(best)], target=None, unit="tokens/s")]


def _write(path: Path, lines: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"


if __name__ == "__main__":
    main()
