"""Retrieval-augmented fine-tuning: from a configuration to a bundle."""

from ragmoe.training.adding import Added, Judges, add_expert, new_expert_config
from ragmoe.training.clusters import place_clusters
from ragmoe.training.config import TrainingConfig, load_config
from ragmoe.training.run import TrainResult, prepare, train
from ragmoe.training.trainer import RagmoeTrainer

__all__ = [
    "Added",
    "Judges",
    "RagmoeTrainer",
    "TrainResult",
    "TrainingConfig",
    "add_expert",
    "load_config",
    "new_expert_config",
    "place_clusters",
    "prepare",
    "train",
]
