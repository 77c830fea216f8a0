"""Trained parts of methods: how they are trained, and how they are kept on disk."""

from fastedit.training.artifact import Artifact, load_artifact, require_artifact, save_artifact
from fastedit.training.config import TrainerConfig
from fastedit.training.state import Task
from fastedit.training.trainer import train_task

__all__ = [
    "Artifact",
    "Task",
    "TrainerConfig",
    "load_artifact",
    "require_artifact",
    "save_artifact",
    "train_task",
]
