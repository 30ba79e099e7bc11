"""mmrep: contrastive representations of any number of modalities.

>>> import mmrep
>>> model = mmrep.load("runs/plain_clip")
>>> rows = model.encode(text=["a red apple"], image=["apple.png"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrep.interop import load as load
    from mmrep.model import MultimodalModel as MultimodalModel

__version__ = "0.1.0"
__all__ = ["MultimodalModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy: `mmrep --help` and `mmrep data` must not wait for torch.
    if name == "load":
        from mmrep.interop import load

        return load
    if name == "MultimodalModel":
        from mmrep.model import MultimodalModel

        return MultimodalModel
    raise AttributeError(f"module 'mmrep' has no attribute '{name}'")
