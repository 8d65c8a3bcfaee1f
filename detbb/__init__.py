"""detbb: train a detector once, then keep adding branches to it, and not one bit of what already works changes.

The public names load their modules on first use, so that `import detbb` is instant.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detbb.checkpoint.content import load_detector
    from detbb.data.formats import FORMATS
    from detbb.detector import build_detector
    from detbb.heads import HEADS, Head
    from detbb.heads.loading import load_config
    from detbb.inference.evaluate import evaluate
    from detbb.inference.predict import predict
    from detbb.modeling.backbones.resnet import build_resnet, build_resnet_c4
    from detbb.modeling.norm import SyncBatchNorm
    from detbb.report.writers import WRITERS, Writer
    from detbb.training.ema import Ema
    from detbb.training.loop import train

__version__ = "0.1.0"
__all__ = [
    "FORMATS",
    "HEADS",
    "WRITERS",
    "Ema",
    "Head",
    "SyncBatchNorm",
    "Writer",
    "build_detector",
    "build_resnet",
    "build_resnet_c4",
    "evaluate",
    "load_config",
    "load_detector",
    "predict",
    "train",
]

_MODULES = {
    "FORMATS": "data.formats",
    "HEADS": "heads",
    "Ema": "training.ema",
    "Head": "heads",
    "SyncBatchNorm": "modeling.norm",
    "WRITERS": "report.writers",
    "Writer": "report.writers",
    "build_detector": "detector",
    "build_resnet": "modeling.backbones.resnet",
    "build_resnet_c4": "modeling.backbones.resnet",
    "evaluate": "inference.evaluate",
    "load_config": "heads.loading",
    "load_detector": "checkpoint.content",
    "predict": "inference.predict",
    "train": "training.loop",
}


class _Package(ModuleType):
    """Three functions share their name with the module they are in; as attributes, the functions win."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _MODULES.get(name) == name):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'detbb' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"detbb.{_MODULES[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
