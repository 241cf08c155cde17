"""What lm-evaluation-harness asks of a model, answered by a generator whose gate sees what the context retrieves.

The class here knows the harness's requests (objects with ``args``) and not the harness: ``lm_eval.py`` registers it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ragmoe._errors import ModelError
from ragmoe.generation.batches import pad_token, read_batch
from ragmoe.generation.generator import Generator
from ragmoe.generation.likelihood import log_likelihoods

if TYPE_CHECKING:
    from ragmoe.index import Index
    from ragmoe.neighbours import Neighbours

# Of a long context, few-shot examples included, its end is what is asked; an encoder would read its beginning.
_QUERY_WORDS = 64
# Tokens that share their neighbours where a whole text is judged.
_CHUNK_TOKENS = 256
_BATCH_TOKENS = 8192
_MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel:
    """``loglikelihood``, ``loglikelihood_rolling`` and ``generate_until`` over a generator.

    Neighbours are what the end of the context retrieves, never what is to be predicted; an empty context has none.

    Args:
        index: None lets the gate see no neighbours.
        batch_size: sequences of a batch; None takes as many as 8192 tokens hold, but no more than ``max_batch_size``.

    Raises:
        ModelError: an index is given to a model whose gate sees no neighbours, or one of another encoder.
    """

    def __init__(
        self,
        generator: Generator,
        index: Index | None = None,
        *,
        batch_size: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        if index is not None and not generator.gate_sees_neighbours:
            raise ModelError(
                f"an index was given, but {type(generator.model).__name__} sees no neighbours: it would change nothing",
                hint="leave the index out",
            )
        if index is not None:
            generator.check_index(index)
        self.generator, self.index = generator, index
        self.tokenizer: Any = generator.tokenizer
        # Some families know no limit: there it is what a prompt may have.
        self.max_length = int(getattr(generator.config, "max_position_embeddings", generator.style.max_length))
        self.batch_rows = max_batch_size if batch_size is None else batch_size
        self.batch_tokens = _BATCH_TOKENS if batch_size is None else self.max_length * batch_size

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) its log-likelihood in nats, and whether greedy decoding would say it."""
        pairs = [self._pair(*request.args) for request in requests]
        shown = self._neighbours([request.args[0] for request in requests])
        found = log_likelihoods(
            self.generator.model,
            pairs,
            shown,
            padding=pad_token(self.tokenizer),
            batch_tokens=self.batch_tokens,
            batch_rows=self.batch_rows,
        )
        return [(likelihood.nats, likelihood.greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text its log-likelihood in nats, every token judged once, with as much as fits before it.

        Neighbours are those of the text before each stretch, without the text itself and its near-duplicates. Every
        stretch has half a model's length or more before it, where the harness's own models begin each of their windows
        with one token: of long texts only figures of this class are to be compared, as that of the base under it.
        """
        from ragmoe.corpus.types import Passage
        from ragmoe.evaluation.perplexity import document_losses
        from ragmoe.training.config import LanguageConfig
        from ragmoe.training.language import LanguageDataset

        texts = [Passage(f"request-{at}", request.args[0]) for at, request in enumerate(requests)]
        if not any(text.text for text in texts):
            return [0.0] * len(texts)
        size = min(_CHUNK_TOKENS, self.max_length // 2)
        config = LanguageConfig(chunk_tokens=size, context_tokens=self.max_length - size, neighbours=self._seen() or 1)
        with tempfile.TemporaryDirectory() as cache:
            data = LanguageDataset(
                texts,
                self.index,
                self.tokenizer,
                config,
                cache=Path(cache),
                recall=lambda found, _: self._recall(found),
            )
            losses = document_losses(self.generator.model, data, batch_chunks=self._rows(self.max_length))
        nats = {loss.document: -loss.nats for loss in losses}
        return [nats.get(text.id, 0.0) for text in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings) what is said up to the first of the texts in ``until``, which is left out."""
        shown = self._neighbours([request.args[0] for request in requests])
        groups: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(at)
        said: dict[int, str] = {}
        for places in groups.values():
            settings = _settings(requests[places[0]].args[1])
            if settings["tokens"] >= self.max_length:
                raise ModelError(
                    f"{settings['tokens']} tokens are to be generated, but the model has {self.max_length} positions",
                    hint="put fewer into the task (generation_kwargs), or give --gen_kwargs max_gen_toks=N",
                )
            rows = {at: self._tokens(requests[at].args[0])[-(self.max_length - settings["tokens"]) :] for at in places}
            order = sorted(places, key=lambda i: -len(rows[i]))
            size = self._rows(len(rows[order[0]]) + settings["tokens"])
            for begin in range(0, len(order), size):
                batch = order[begin : begin + size]
                seen = shown.rows(batch) if shown is not None else None
                texts = self._generate([rows[i] for i in batch], seen, **settings)
                said.update(zip(batch, texts, strict=True))
        return [said[at] for at in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the tokenizer's template has it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its requests apart by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template in use, '' for none."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def _rows(self, length: int) -> int:
        """How many sequences of a length a batch holds."""
        rows = max(1, self.batch_tokens // length)
        return rows if self.batch_rows is None else min(rows, self.batch_rows)

    def _seen(self) -> int:
        return int(self.generator.config.neighbours) if self.index is not None else 0

    def _recall(self, found: Neighbours) -> Neighbours:
        """Neighbours with what the gates want beside their embeddings."""
        return self.generator.recall(found, self.index) if self.index is not None else found

    def _neighbours(self, contexts: Sequence[str]) -> Neighbours | None:
        """A row for each context; None without an index."""
        from ragmoe.neighbours import Neighbours

        index, seen = self.index, self._seen()
        if index is None or not contexts:
            return None
        queries = [" ".join(context.split()[-_QUERY_WORDS:]) for context in contexts]
        # The choices of one question share their context.
        asked = list(dict.fromkeys(query for query in queries if query))
        none = Neighbours.empty(1, index.width, seen)
        if not asked:
            return Neighbours.stack([none] * len(queries))
        found = self._recall(index.neighbours(asked, seen))
        rows = {query: found.rows([at]) for at, query in enumerate(asked)}
        # Without neighbours a row has nothing else either: it is one of the others with all of them hidden.
        hidden = found.rows([0]).masked(torch.zeros_like(found.mask_BN[:1]))
        return Neighbours.stack([rows.get(query, hidden) for query in queries])

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Context and continuation as tokens, cut where the whole text's tokens are cut; of the context what fits.

        Where one token spans both (``1`` and ``0`` as ``10``), each has its own, so that all of the continuation is
        judged, and that alone.
        """
        # A space that ends the context belongs to the word after it.
        spaces = context[len(context.rstrip()) :]
        context, continuation = context.rstrip(), spaces + continuation
        if context:
            before, whole = self._tokens(context), self._tokens(context + continuation)
            apart = len(whole) <= len(before) or whole[: len(before)] != before
            after = self._tokens(continuation, special=False) if apart else whole[len(before) :]
        else:
            before, after = [self._first()], self._tokens(continuation, special=False)
        room = self.max_length - len(after)
        if room < 1:
            raise ModelError(f"a continuation has {len(after)} tokens, but the model has {self.max_length} positions")
        return before[-room:], after

    def _tokens(self, text: str, *, special: bool = True) -> list[int]:
        # A chat template has written the first token already.
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        ids = list(self.tokenizer(text, add_special_tokens=special and not begun, verbose=False)["input_ids"])
        return (ids[:-1] if special and ids and ids[-1] == self.tokenizer.eos_token_id else ids) or [self._first()]

    def _first(self) -> int:
        """What stands before a text that has nothing before it."""
        first = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if first is None else first)

    @torch.no_grad()
    def _generate(
        self, rows: Sequence[list[int]], neighbours: Neighbours | None, *, until: list[str], tokens: int, **how: Any
    ) -> list[str]:
        model = self.generator.model.eval()
        batch = read_batch(rows, pad_token(self.tokenizer), neighbours, left=True)
        if until:
            how |= {"stop_strings": until, "tokenizer": self.tokenizer}
        device = next(model.parameters()).device
        made = model.generate(
            **{name: x.to(device) for name, x in batch.items()},
            max_new_tokens=tokens,
            pad_token_id=pad_token(self.tokenizer),
            eos_token_id=self.generator.ends,
            **how,
        )
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in made[:, batch["input_ids"].shape[1] :]]
        return [_until(text, until) for text in texts]


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's settings of one request as ``generate`` has them; greedy where nothing else is said."""
    rest = dict(given)
    until = rest.pop("until", None) or []
    tokens = next((int(rest[name]) for name in _MAX_NEW_TOKENS if rest.get(name)), 256)
    rest = {name: value for name, value in rest.items() if name not in _MAX_NEW_TOKENS}
    sampled = bool(rest.pop("do_sample", rest.get("temperature") or False))
    if not sampled:
        # What only sampling asks for.
        rest = {name: value for name, value in rest.items() if name not in ("temperature", "top_p", "top_k")}
    return {"until": [until] if isinstance(until, str) else list(until), "tokens": tokens, "do_sample": sampled, **rest}


def _until(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some others."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
