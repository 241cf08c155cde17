"""Causal language models that answer from retrieved passages: prompts, batches, likelihoods, answers with citations."""

from __future__ import annotations

from ragmoe.generation.citations import cite, cited_numbers, without_citations
from ragmoe.generation.prompts import REFUSAL, Prompt, PromptMaker, PromptStyle

__all__ = ["REFUSAL", "Prompt", "PromptMaker", "PromptStyle", "cite", "cited_numbers", "without_citations"]
