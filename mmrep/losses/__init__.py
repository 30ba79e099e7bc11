"""The objectives, one file a family, on one interface: see `mmrep.losses.base.Loss`."""

from mmrep.losses.base import Loss, LossOutput
from mmrep.losses.cluster_swap import ClusterSwapLoss
from mmrep.losses.confu import ConFuLoss
from mmrep.losses.gram import GRAMLoss
from mmrep.losses.modality_pairwise import ModalityPairwiseLoss
from mmrep.losses.pairwise_clip import PairwiseCLIPLoss
from mmrep.losses.symile import SymileLoss
from mmrep.losses.triangle import TriangleLoss

__all__ = [
    "ClusterSwapLoss",
    "ConFuLoss",
    "GRAMLoss",
    "Loss",
    "LossOutput",
    "ModalityPairwiseLoss",
    "PairwiseCLIPLoss",
    "SymileLoss",
    "TriangleLoss",
]
