"""A causal language model as something that answers questions from an index, with citations.

    generator = Generator.load("runs/generator")
    generator.answer(["How long do I keep biting on the gauze?"], index)[0].text

Any Hugging Face causal language model will do; neighbours go to those whose gate sees them, by their names.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ragmoe._errors import ModelError
from ragmoe._quiet import quiet_loading
from ragmoe.bundle import is_bundle
from ragmoe.corpus.types import Passage
from ragmoe.generation.answers import GeneratedAnswer, read_answer
from ragmoe.generation.batches import pad_token, read_batch, sees_neighbours
from ragmoe.generation.likelihood import Count, Likelihood, log_likelihoods
from ragmoe.generation.prompts import REFUSAL, Prompt, PromptMaker, PromptStyle
from ragmoe.generation.tokenizer import open_tokenizer
from ragmoe.models.health import require_numbers
from ragmoe.models.saving import BundleMixin
from ragmoe.neighbours import Neighbours

if TYPE_CHECKING:
    from ragmoe.gates import Routing
    from ragmoe.index import Index
    from ragmoe.moe import RoutingStatistics

STYLE_NAME = "prompt.json"
# Whatever of it a base's own generation_config says: a penalty of repetition, say, would be one of quoting the
# passages.
_GREEDILY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "min_new_tokens": 0,
}  # fmt: skip
# So many logits of what a batch says are kept, in float32 a gigabyte.
_LOGITS = 1 << 28
# What is the model's own, and what stands for it where a model has nothing of the kind.
_OWN: dict[str, Any] = {
    **dict.fromkeys(("sparse_layers", "expert_names", "held_back", "bundle_digests"), ()),
    "expert_store": None,
}


def is_generator(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a causal language model, by its ``config.json``."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = config.get("architectures") if isinstance(config, dict) else None
    # The oldest ones are called after their head, as GPT2LMHeadModel.
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names or ())


def register_decoders() -> None:
    """Make our own families known to the Auto classes, which happens as they are imported."""
    importlib.import_module("ragmoe.models.families")


class Generator:
    """A causal language model, its tokenizer, and the way it is asked.

    It has what ``ragmoe.evaluation.evaluate`` needs of a model. What a family adds of its own (``recall``, ``memory``,
    ``check_index``, ``parameter_counts``) is the model's where it has it.

    Attributes:
        sparse_layers, expert_names, held_back: as the model says; empty for one without experts of ours.
        bundle_digests: of the bundle's version that it was loaded from and of those before, newest first.
        expert_store: where experts are brought in from their files; None where all are in memory.
    """

    sparse_layers: Sequence[int]
    expert_names: Sequence[str]
    held_back: Sequence[int]
    bundle_digests: Sequence[str]
    expert_store: Any

    def __init__(self, model: Any, tokenizer: Any, style: PromptStyle | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        positions = getattr(model.config, "max_position_embeddings", None)
        if style is None and positions is not None:
            # Nobody has said how it is asked: as any model is, within its positions.
            length = min(PromptStyle.max_length, positions)
            style = PromptStyle(max_length=length, max_answer_tokens=min(PromptStyle.max_answer_tokens, length // 2))
        self.prompts = PromptMaker(tokenizer, style, self.ends)
        if positions is not None and self.style.max_length > positions:
            raise ModelError(
                f"prompts have up to {self.style.max_length} tokens, but the model has {positions} positions",
                hint="raft.max_length=LESS for training, max_length in prompt.json for a model that is trained",
            )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        without: Sequence[int | str] = (),
        resident_experts: int | None = None,
    ) -> Generator:
        """Open what ``save`` wrote, or any folder of a causal language model with a tokenizer.

        Args:
            without, resident_experts: of a bundle, as ``load_decoder`` takes them.

        Raises:
            ModelError: the folder holds none, its prompt.json is damaged, or experts are spoken of and it is no bundle.
        """
        from transformers import AutoModelForCausalLM

        path = Path(folder)
        if not is_generator(path):
            raise ModelError(
                f"{path} holds no causal language model: expected a config.json that says ...ForCausalLM or "
                "...LMHeadModel"
            )
        style, file = None, path / STYLE_NAME
        if file.is_file():
            try:
                style = PromptStyle(**json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ModelError(f"{file} is damaged: {error}") from None
        if not is_bundle(path) and (without or resident_experts is not None):
            raise ModelError(f"{path} is no bundle: it has no experts of its own to be left out or kept in files")
        register_decoders()
        with quiet_loading():
            if is_bundle(path):
                from ragmoe.models.families import load_decoder

                model: Any = load_decoder(path, without=without, resident_experts=resident_experts)
            else:
                model = AutoModelForCausalLM.from_pretrained(path).eval()
        return cls(model, open_tokenizer(path, model), style)

    def save(self, folder: str | os.PathLike[str], **how: Any) -> None:
        """Write model, tokenizer and prompt style into a folder; ``load`` gives them back.

        What makes it whole comes last: the map of a bundle, and the prompt style of any other.

        Args:
            how: what the model's own ``save_pretrained`` takes.
        """
        if isinstance(self.model, BundleMixin):
            self._save_words(Path(folder))
            self._save_model(folder, how)
        else:
            self._save_model(folder, how)
            self._save_words(Path(folder))

    def _save_model(self, folder: str | os.PathLike[str], how: Mapping[str, Any]) -> None:
        with quiet_loading():
            self.model.save_pretrained(folder, **how)

    def _save_words(self, folder: Path) -> None:
        """The tokenizer and, last, the prompt style."""
        self.tokenizer.save_pretrained(folder)
        (folder / STYLE_NAME).write_text(json.dumps(asdict(self.style), indent=2) + "\n", encoding="utf-8")

    @property
    def style(self) -> PromptStyle:
        return self.prompts.style

    @property
    def config(self) -> Any:
        return self.model.config

    def __getattr__(self, name: str) -> Any:
        if name not in _OWN:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.model, name, _OWN[name])

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        return self.model.named_modules()

    @property
    def gate_sees_neighbours(self) -> bool:
        return sees_neighbours(self.model)

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()

    def parameter_counts(self) -> dict[str, int]:
        """``total`` and ``active`` for one token: all of them in a dense model."""
        if hasattr(self.model, "parameter_counts"):
            return dict(self.model.parameter_counts())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return {"total": total, "active": total}

    def check_index(self, index: Any) -> None:
        """Raise ModelError where the gate learned to read embeddings of another encoder."""
        if hasattr(self.model, "check_index"):
            self.model.check_index(index)

    def memory(self, index: Any) -> Any:
        return self.model.memory(index) if hasattr(self.model, "memory") else None

    def forget_memory(self) -> None:
        """Look again, with the next question, at what is recorded with an index."""
        if hasattr(self.model, "forget_memory"):
            self.model.forget_memory()

    def recall(self, neighbours: Neighbours, index: Any, domains: Sequence[str] | None = None) -> Neighbours:
        """The neighbours with what the gates want beside their embeddings."""
        return self.model.recall(neighbours, index, domains) if hasattr(self.model, "recall") else neighbours

    def answer(
        self, questions: Sequence[str], index: Index, *, passages: int = 5, neighbours: int | None = None
    ) -> list[GeneratedAnswer]:
        """Answer from an index: retrieve, let the neighbours steer the gate, say it with the passages' numbers.

        Args:
            passages: how many are put into the prompt; 0 asks from memory.
            neighbours: how many the gate sees; None means as many as the model was trained with.
        """
        self.check_index(index)
        N = (self.config.neighbours if neighbours is None else neighbours) if self.gate_sees_neighbours else 0
        found = index.neighbours(questions, max(N, passages, 1))
        read = [index.passages(ids[:passages]) for ids in found.passage_ids]
        return self.read(questions, read, self.recall(found.first(N), index) if N else None)

    def read(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        neighbours: Neighbours | None = None,
        *,
        batch_tokens: int = 8192,
        statistics: RoutingStatistics | None = None,
        domains: Sequence[str] | None = None,
    ) -> list[GeneratedAnswer]:
        """Answer each question from its own passages, all in one prompt, best first.

        Args:
            neighbours: what the gate sees, a row a question.
            batch_tokens: tokens of a batch, padding and answers included.
            statistics, domains: as readers take them; the tokens of the prompt are counted, without what is said.

        Raises:
            ModelError: the model answers NaN; it names the broken expert, where there is one.
        """
        for name, given in (("passages", passages), ("neighbours", neighbours)):
            if given is not None and len(given) != len(questions):
                raise ValueError(f"{len(questions)} questions, but {name} for {len(given)}")
        refusal = self.prompts.answer_ids(REFUSAL)
        prompts = [
            self.prompts.make(asked, shown, room=len(refusal)) for asked, shown in zip(questions, passages, strict=True)
        ]
        said = self._generate(prompts, neighbours, batch_tokens)
        lengths = [len(prompt.ids) for prompt in prompts]
        count = _prompts_alone(statistics, lengths, domains) if statistics is not None and self.sparse_layers else None
        refused = self._likelihoods([(prompt.ids, refusal) for prompt in prompts], neighbours, batch_tokens, count)
        return [
            read_answer(prompt, text, nats, none.nats)
            for prompt, (text, nats), none in zip(prompts, said, refused, strict=True)
        ]

    def likelihoods(
        self,
        question: str,
        passages: Sequence[Passage],
        answers: Sequence[str],
        neighbours: Neighbours | None = None,
    ) -> list[Likelihood]:
        """How likely each of some answers to one question is, without the token that would end it.

        Args:
            neighbours: of that question, one row.
        """
        if neighbours is not None and len(neighbours) != 1:
            raise ValueError(f"one question, but neighbours for {len(neighbours)}")
        choices = [self.prompts.answer_ids(answer)[:-1] for answer in answers]
        prompt = self.prompts.make(question, passages, room=max(map(len, choices), default=0))
        pairs = [(prompt.ids, choice) for choice in choices]
        rows = neighbours.rows([0] * len(answers)) if neighbours is not None else None
        return self._likelihoods(pairs, rows, 8192)

    @torch.no_grad()
    def route(self, question: str, passages: Sequence[Passage], neighbours: Neighbours | None = None) -> np.ndarray:
        """Mean gate probabilities (L, E) over the tokens of the prompt; (0, 0) of a model without experts of ours.

        Zero, and a ModelError, as a reader's.
        """
        if not self.sparse_layers:
            return np.zeros((0, 0))
        seen = neighbours if self.gate_sees_neighbours else None
        batch = read_batch([self.prompts.make(question, passages).ids], pad_token(self.tokenizer), seen)
        device = next(self.model.parameters()).device
        output = self.model.eval()(**{name: x.to(device) for name, x in batch.items()}, output_routings=True)
        require_numbers(self.model, *(routing.logits_SE for routing in output.routings))
        means = [routing.probabilities_SE().mean(dim=0) for routing in output.routings]
        return np.asarray(torch.stack(means).double().cpu())

    def _likelihoods(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        neighbours: Neighbours | None,
        batch_tokens: int,
        count: Count | None = None,
    ) -> list[Likelihood]:
        padding = pad_token(self.tokenizer)
        return log_likelihoods(self.model, pairs, neighbours, padding=padding, batch_tokens=batch_tokens, count=count)

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Prompt], neighbours: Neighbours | None, batch_tokens: int
    ) -> list[tuple[str, float]]:
        """Of each prompt what the model says, greedily, and its log-probability in nats."""
        self.model.eval()
        device = next(self.model.parameters()).device
        seen = neighbours if self.gate_sees_neighbours else None
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        found: dict[int, tuple[str, float]] = {}
        while order:
            size = max(1, batch_tokens // (len(prompts[order[0]].ids) + self.style.max_answer_tokens))
            size = max(1, min(size, _LOGITS // (self.style.max_answer_tokens * self._vocabulary)))
            at, order = order[:size], order[size:]
            rows = seen.rows(at) if seen is not None else None
            batch = read_batch([prompts[i].ids for i in at], pad_token(self.tokenizer), rows, left=True)
            found.update(zip(at, self._said({name: x.to(device) for name, x in batch.items()}), strict=True))
        return [found[i] for i in range(len(prompts))]

    @property
    def _vocabulary(self) -> int:
        """The size of the vocabulary."""
        return int(self.model.config.get_text_config().vocab_size)

    def _said(self, inputs: dict[str, Tensor]) -> list[tuple[str, float]]:
        ends = self.ends
        made = self.model.generate(
            **inputs,
            max_new_tokens=self.style.max_answer_tokens,
            **_GREEDILY,
            pad_token_id=pad_token(self.tokenizer),
            eos_token_id=ends,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new_BT = made.sequences[:, inputs["input_ids"].shape[1] :]
        # Step by step: of all steps together they would be gigabytes, where the vocabulary is large.
        steps = zip(made.logits, new_BT.unbind(dim=1), strict=True)
        nats_BT = torch.stack([x_BV.float().log_softmax(1).gather(1, t_B.unsqueeze(1))[:, 0] for x_BV, t_B in steps], 1)
        is_end_BT = torch.isin(new_BT, torch.tensor(ends, device=new_BT.device))
        # An answer reaches up to its end; what stands behind it is padding.
        own_BT = is_end_BT.cumsum(dim=1) - is_end_BT.int() == 0
        texts = [
            self.tokenizer.decode(ids[own & ~end], skip_special_tokens=True).strip()
            for ids, own, end in zip(new_BT, own_BT, is_end_BT, strict=True)
        ]
        # Behind the end stands padding, which may be impossible.
        nats_B = nats_BT.masked_fill(~own_BT, 0.0).sum(dim=1)
        require_numbers(self.model, nats_B)
        return list(zip(texts, nats_B.tolist(), strict=True))

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and those that the model's own settings name."""
        named = self.model.generation_config.eos_token_id
        named = [] if named is None else named if isinstance(named, list) else [named]
        return list(dict.fromkeys([self.tokenizer.eos_token_id, *named]))


def _prompts_alone(statistics: RoutingStatistics, lengths: Sequence[int], domains: Sequence[str] | None) -> Count:
    """Counts the routing of the first ``lengths`` tokens of each sequence, by its domain."""

    def count(routings: Sequence[Routing], mask_S: Tensor, at: list[int]) -> None:
        mask_BT = mask_S.view(len(at), -1)
        ends_B = torch.tensor([lengths[i] for i in at], device=mask_S.device)
        own_BT = mask_BT & (torch.arange(mask_BT.shape[1], device=mask_S.device) < ends_B.unsqueeze(1))
        statistics.update(routings, own_BT.reshape(-1), [domains[i] if domains else "" for i in at])

    return count
