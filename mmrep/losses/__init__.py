"""The objectives, one file a family, on one interface: see `mmrep.losses.base.Loss`."""

from mmrep.losses.base import Loss, LossOutput
from mmrep.losses.pairwise_clip import PairwiseCLIPLoss
from mmrep.losses.symile import SymileLoss

__all__ = ["Loss", "LossOutput", "PairwiseCLIPLoss", "SymileLoss"]
