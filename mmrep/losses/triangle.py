"""TRIANGLE: the area of the triangle between three rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses.geometric import GeometricLoss


class TriangleLoss(GeometricLoss):
    r"""Area contrast of three modalities (TRIANGLE, NeurIPS 2025).

    With ``u = a - b`` and ``v = a - c`` the paper's area is ``1/2 sqrt(|u|^2 |v|^2 - (u.v)^2)``; its training code leaves the
    root out and takes ``(|u|^2 |v|^2 - (u.v)^2) / 2``, twice the squared area. That is the default here. With ``root`` a small
    ``eps`` under the root keeps the gradient finite; in fp32 the root loses digits where the corners nearly coincide (2 % of
    the gradient where they are .001 apart).

    Args:
        anchor: See `GeometricLoss`.
        init_temperature, learn_temperature, max_logit_scale: Of the logit scale.
        label_smoothing: As published, .1.
        root: Whether the size is the area itself.
        epsilon: Keeps the gradient of the root finite.
        modalities: See `Loss`; three of them.
    """

    def __init__(
        self,
        *,
        anchor: str | None = None,
        init_temperature: float = 0.07,
        learn_temperature: bool = True,
        max_logit_scale: float | None = 100.0,
        label_smoothing: float = 0.1,
        root: bool = False,
        epsilon: float = 1e-6,
        modalities: Sequence[str] | None = None,
    ) -> None:
        if not epsilon > 0:
            raise ConfigError(f"epsilon={epsilon} must be positive")
        if modalities is not None and len(modalities) != 3:
            raise ConfigError(f"a triangle has three modalities, not {list(modalities)}", fix="GRAM takes any number")
        super().__init__(
            anchor=anchor,
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            label_smoothing=label_smoothing,
            modalities=modalities,
            root=root,
            epsilon=epsilon,
        )
        self.root, self.epsilon = root, epsilon

    def size(self, anchor: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Areas, or twice their squares, ``[A, C]``: see `GeometricLoss.size`.

        Raises:
            LossError: If there are not three rows: two span no area.
        """
        if len(others) != 2:
            raise LossError(f"a triangle has three corners, not {1 + len(others)}", fix="give two modalities")
        b, c = others
        # Inner products of differences, expanded: a K x K x D tensor of the differences themselves is never made.
        ab, ac, bc = anchor @ b.T, anchor @ c.T, (b * c).sum(dim=1)
        aa, bb, cc = (anchor * anchor).sum(dim=1, keepdim=True), (b * b).sum(dim=1), (c * c).sum(dim=1)
        uu, vv, uv = aa - 2 * ab + bb, aa - 2 * ac + cc, aa - ab - ac + bc
        twice_squared = (uu * vv - uv * uv) / 2
        return (twice_squared.clamp(min=0) / 2 + self.epsilon).sqrt() if self.root else twice_squared
