"""Published and derived values of SwAV on a closed-form input without random numbers.

``z_v[b, d] = sin(1 + .7 b + 1.3 d + .11 v (b + 1) + .05 b d + shift)`` and ``C[k, d] = cos(.3 + .9 k + .4 d + .13 k d)``, rows
of length 1; B = 8, K = 12, D = 6, T = .1, eps = .05, 3 iterations, float64. G1 and G2 are what facebookresearch/swav, lightly
and solo-learn give; G3 also MGCA's form; G4 and G5 follow from the definition alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

B, K, D = 8, 12, 6
G1_SIX_CROPS_TWO_ASSIGN = 7.405893967466976
G1B_CODES = (0.32021276, 0.31916957, 0.00061966, 1e-8)
G2_WITH_QUEUE = 7.23991199736812
G3_TWO_VIEWS = 3.8316166854231244
G4_THREE_MODALITIES = 4.630528375266758
G5_CROSS, G5_ALL, G5_INTRA = 7.786597606494612, 6.931873990425238, 3.512979526147737
G6_IDENTITY = 0.0014070473241671
G7_CONSTANT = 2.4849066497880
G8_THREE_CROPS = 4.3604637829148585


def features(view: int, *, rows: int = B, shift: float = 0.0) -> Tensor:
    """``z_v`` ``[rows, D]``."""
    b, d = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(D, dtype=torch.float64)
    return F.normalize(torch.sin(1 + 0.7 * b + 1.3 * d + 0.11 * view * (b + 1) + 0.05 * b * d + shift), dim=1)


def prototypes() -> Tensor:
    """``C`` ``[K, D]``."""
    k, d = torch.arange(K, dtype=torch.float64)[:, None], torch.arange(D, dtype=torch.float64)
    return F.normalize(torch.cos(0.3 + 0.9 * k + 0.4 * d + 0.13 * k * d), dim=1)
