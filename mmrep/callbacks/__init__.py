"""Callbacks that a config names: figures in the loop, averaged weights, the best checkpoint. One a file."""

from mmrep.callbacks.ema import EMA
from mmrep.callbacks.knn_probe import KNNProbe
from mmrep.callbacks.monitored import MonitoredCheckpoint, MonitoredStopping
from mmrep.callbacks.online_linear_probe import OnlineLinearProbe
from mmrep.callbacks.zero_shot_evaluation import ZeroShotEvaluation

__all__ = [
    "EMA",
    "KNNProbe",
    "MonitoredCheckpoint",
    "MonitoredStopping",
    "OnlineLinearProbe",
    "ZeroShotEvaluation",
]
