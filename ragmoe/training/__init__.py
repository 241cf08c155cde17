"""Retrieval-augmented fine-tuning: from a configuration to a bundle."""

from ragmoe.training.config import TrainingConfig, load_config
from ragmoe.training.run import TrainResult, prepare, train
from ragmoe.training.trainer import RagmoeTrainer

__all__ = ["RagmoeTrainer", "TrainResult", "TrainingConfig", "load_config", "prepare", "train"]
