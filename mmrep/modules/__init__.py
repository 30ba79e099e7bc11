"""The LightningModules: optimiser, schedule, logging, checkpoint; nothing else."""

from mmrep.modules.base import ContrastiveModule
from mmrep.modules.higher_order import HigherOrder
from mmrep.modules.modality_pairwise import ModalityPairwise
from mmrep.modules.pairwise_clip import PairwiseCLIP
from mmrep.modules.swav import SwAV
from mmrep.modules.symile import Symile

__all__ = ["ContrastiveModule", "HigherOrder", "ModalityPairwise", "PairwiseCLIP", "SwAV", "Symile"]
