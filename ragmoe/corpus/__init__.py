"""Corpora and questions: readers for several formats, chunking with remapped answers, and the check of a data set."""

from __future__ import annotations

from ragmoe.corpus.check import Problem, check_questions
from ragmoe.corpus.chunking import Chunk, chunk_passage, remap_questions
from ragmoe.corpus.cloze import cloze_questions
from ragmoe.corpus.passages import PassageReader, read_documents, read_passages
from ragmoe.corpus.questions import read_questions, write_questions
from ragmoe.corpus.types import Passage, Question, Span

__all__ = [
    "Chunk",
    "Passage",
    "PassageReader",
    "Problem",
    "Question",
    "Span",
    "check_questions",
    "chunk_passage",
    "cloze_questions",
    "read_documents",
    "read_passages",
    "read_questions",
    "remap_questions",
    "write_questions",
]
