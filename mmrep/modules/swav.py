"""`SwAV`: trains with `mmrep.losses.ClusterSwapLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrep.encoders import Encoder
from mmrep.errors import ConfigError
from mmrep.losses import ClusterSwapLoss
from mmrep.losses.weights import Matrix
from mmrep.modules.base import ContrastiveModule


class SwAV(ContrastiveModule):
    """Swaps cluster codes between the views of any number of modalities; one modality with multi-crop is SwAV itself.

    Args:
        encoders: Modality -> encoder. Views come from their ``crops`` or ``views``.
        num_prototypes: About ten times the classes that one hopes for; a list gives several sets.
        prototypes: ``shared`` or ``per_modality``.
        pairs: ``all``, ``cross``, ``intra``, or M x M weights; by default ``cross``, and ``all`` for one modality.
        teacher_views: The first so many views of each modality assign codes: with multi-crop, the global ones. Null: all.
        temperature: Of the predictions.
        epsilon: Smoothness of the codes.
        iterations: Of Sinkhorn-Knopp.
        codes: ``own``, ``product`` or ``mean``: what a view's codes are made from.
        marginals: ``view``, ``modality`` or ``union``: over what every prototype gets its equal share.
        queue_length: Earlier features per assigning view that help to balance a small batch; 0 for none.
        queue_start: Steps before the queue is used.
        freeze_steps: Steps in which the prototypes stand still.
        hard_steps: Steps with codes rounded to one prototype.
        **training: See `ContrastiveModule`; embeddings are of length 1 here.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        num_prototypes: int | list[int] = 300,
        prototypes: str = "shared",
        pairs: str | Matrix | None = None,
        teacher_views: int | None = None,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        codes: str = "own",
        marginals: str = "view",
        queue_length: int = 0,
        queue_start: int = 0,
        freeze_steps: int = 0,
        hard_steps: int = 0,
        **training: Any,
    ) -> None:

        def make_loss(modalities: list[str], embed_dim: int) -> ClusterSwapLoss:
            return ClusterSwapLoss(
                modalities=modalities,
                embed_dim=embed_dim,
                num_prototypes=num_prototypes,
                prototypes=prototypes,
                pairs=pairs,
                teacher_views=teacher_views,
                temperature=temperature,
                epsilon=epsilon,
                iterations=iterations,
                codes=codes,
                marginals=marginals,
                queue_length=queue_length,
                queue_start=queue_start,
                freeze_steps=freeze_steps,
                hard_steps=hard_steps,
            )

        super().__init__(encoders, make_loss, **training)
        if self.model.normalize != "l2":
            raise ConfigError("prototypes are compared by cosine", fix="leave normalize at l2")
