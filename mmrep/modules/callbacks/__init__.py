"""Callbacks that a config names: figures in the loop, averaged weights, the best checkpoint. One a file."""

from mmrep.modules.callbacks.ema import EMA
from mmrep.modules.callbacks.knn_probe import KNNProbe
from mmrep.modules.callbacks.monitored import MonitoredCheckpoint, MonitoredStopping
from mmrep.modules.callbacks.online_linear_probe import OnlineLinearProbe
from mmrep.modules.callbacks.zero_shot_evaluation import ZeroShotEvaluation

__all__ = [
    "EMA",
    "KNNProbe",
    "MonitoredCheckpoint",
    "MonitoredStopping",
    "OnlineLinearProbe",
    "ZeroShotEvaluation",
]
