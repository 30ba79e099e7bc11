"""What a training run does beside its steps: figures, reports, files. One callback a file."""

from mmrep.callbacks.zero_shot_evaluation import ZeroShotEvaluation

__all__ = ["ZeroShotEvaluation"]
