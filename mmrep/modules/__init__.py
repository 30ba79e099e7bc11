"""The LightningModules: optimiser, schedule, logging, checkpoint; nothing else."""

from mmrep.modules.base import ContrastiveModule
from mmrep.modules.pairwise_clip import PairwiseCLIP
from mmrep.modules.symile import Symile

__all__ = ["ContrastiveModule", "PairwiseCLIP", "Symile"]
