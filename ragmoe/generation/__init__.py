"""Causal language models that answer from retrieved passages: prompts, batches, likelihoods, answers with citations."""

from __future__ import annotations

from ragmoe.generation.answers import GeneratedAnswer
from ragmoe.generation.citations import cite, cited_numbers, without_citations
from ragmoe.generation.generator import Generator, is_generator
from ragmoe.generation.likelihood import Likelihood, log_likelihoods
from ragmoe.generation.prompts import REFUSAL, Prompt, PromptMaker, PromptStyle

__all__ = [
    "REFUSAL",
    "GeneratedAnswer",
    "Generator",
    "Likelihood",
    "Prompt",
    "PromptMaker",
    "PromptStyle",
    "cite",
    "cited_numbers",
    "is_generator",
    "log_likelihoods",
    "without_citations",
]
