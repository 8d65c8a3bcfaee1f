"""detbb: train a detector once, then keep adding branches to it, and not one bit of what already works changes.

The public names load their modules on first use, so that `import detbb` is instant.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detbb.checkpoint.content import load_detector as load_detector
    from detbb.data.formats import FORMATS as FORMATS
    from detbb.detector import build_detector as build_detector
    from detbb.freeze import digests as digests
    from detbb.freeze import freeze as freeze
    from detbb.freeze import frozen_names as frozen_names
    from detbb.heads import HEADS as HEADS
    from detbb.heads import Head as Head
    from detbb.heads.loading import load_config as load_config
    from detbb.inference.evaluate import evaluate as evaluate
    from detbb.inference.predict import predict as predict
    from detbb.modeling.backbones import BACKBONES as BACKBONES
    from detbb.modeling.backbones import Backbone as Backbone
    from detbb.modeling.backbones.resnet import build_resnet as build_resnet
    from detbb.modeling.backbones.resnet import build_resnet_c4 as build_resnet_c4
    from detbb.modeling.norm import SyncBatchNorm as SyncBatchNorm
    from detbb.report.writers import WRITERS as WRITERS
    from detbb.report.writers import Writer as Writer
    from detbb.training.ema import Ema as Ema
    from detbb.training.loop import train as train

__version__ = "0.1.0"
_NAMES = {
    "checkpoint.content": "load_detector",
    "data.formats": "FORMATS",
    "detector": "build_detector",
    "freeze": "digests freeze frozen_names",
    "heads": "HEADS Head",
    "heads.loading": "load_config",
    "inference.evaluate": "evaluate",
    "inference.predict": "predict",
    "modeling.backbones": "BACKBONES Backbone",
    "modeling.backbones.resnet": "build_resnet build_resnet_c4",
    "modeling.norm": "SyncBatchNorm",
    "report.writers": "WRITERS Writer",
    "training.ema": "Ema",
    "training.loop": "train",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'detbb' has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"detbb.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


class _Package(ModuleType):
    """Python sets the module detbb/freeze.py as `detbb.freeze` when it is imported; there, the function stays."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "freeze" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
