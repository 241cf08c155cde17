"""Domain QA evaluation: tasks, scores, comparisons, experiments and their reports."""

from __future__ import annotations

from ragmoe.evaluation.results import Results, find_runs
from ragmoe.evaluation.retrieval import Retrieval
from ragmoe.evaluation.run import evaluate
from ragmoe.evaluation.samples import Sample
from ragmoe.evaluation.statistics import Comparison, Interval, compare, interval
from ragmoe.evaluation.task import Task, load_task

__all__ = [
    "Comparison",
    "Interval",
    "Results",
    "Retrieval",
    "Sample",
    "Task",
    "compare",
    "evaluate",
    "find_runs",
    "interval",
    "load_task",
]
