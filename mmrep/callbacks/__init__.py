"""What a training run does beside its steps: figures, reports, files. One callback a file."""

from mmrep.callbacks.ema import EMA
from mmrep.callbacks.knn_probe import KNNProbe
from mmrep.callbacks.monitored import MonitoredCheckpoint, MonitoredStopping
from mmrep.callbacks.online_linear_probe import OnlineLinearProbe
from mmrep.callbacks.throughput import Throughput
from mmrep.callbacks.zero_shot_evaluation import ZeroShotEvaluation

__all__ = [
    "EMA",
    "KNNProbe",
    "MonitoredCheckpoint",
    "MonitoredStopping",
    "OnlineLinearProbe",
    "Throughput",
    "ZeroShotEvaluation",
]
