"""The configuration: dataclasses with a doc line per field. `docs/config.md` is made from this file.

`load_config` (detbb/config/loading.py) reads YAML onto these classes and refuses what it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Norm = Literal["bn", "frozen_bn", "sync_bn", "gn"]


@dataclass
class BackboneConfig:
    """The ResNet that all branches share."""

    arch: str = "resnet50"
    """Any ResNet, ResNeXt or wide ResNet of torchvision: `resnet18|34|50|101|152`, `resnext50_32x4d`,
    `wide_resnet50_2`, …"""
    weights: str | None = None
    """`null` (random), `imagenet` (torchvision's, hash-checked; the only setting that may download), or a file
    (torchvision, Detectron2 or MMDetection naming; `.pth .pt .pkl .safetensors`)."""
    norm: Norm = "frozen_bn"
    """`bn`, `frozen_bn` (statistics and affine are constants), `sync_bn` (statistics over all processes) or `gn`."""
    norm_eval: bool = False
    """`true`: running statistics stay fixed in the whole backbone (MMDetection's `norm_eval`)."""
    norm_affine: bool = True
    """`false`: norm weight and bias are not trained (MMDetection's `norm_cfg.requires_grad`)."""
    allow_random: bool = False
    """`true`: let `frozen_bn`, or a part that is never trained, keep its random weights."""


@dataclass
class NeckConfig:
    """What turns backbone stages into feature levels."""

    type: Literal["fpn", "none"] = "fpn"
    """`fpn`: levels p2 … p7 and pool, as far as the heads ask for them; `none`: heads see layer1 … layer4."""
    channels: int = 256
    """Channels of every FPN level."""
    norm: Norm | None = None
    """A norm after each FPN convolution; `null`: a bias instead (the original FPN)."""
    norm_eval: bool = False
    """`true`: running statistics stay fixed in the neck."""
    norm_affine: bool = True
    """`false`: the neck's norm weight and bias are not trained."""
    allow_random: bool = False
    """`true`: let a neck that is never trained keep its random weights."""


@dataclass
class SplitConfig:
    """Where one split of a data source is."""

    images: str | None = None
    """Folder of images. `shapes`: the folder to generate into (default `data/shapes`)."""
    annotations: str | None = None
    """`coco`: the JSON file; `voc`: the image-set file (its XML in `Annotations/`); `yolo`: the folder of txt labels;
    `semantic`: the folder of class-index PNG masks."""
    size: int | None = None
    """`shapes` only: how many images to generate."""


@dataclass
class DataConfig:
    """One data source: images and annotations of one class list."""

    format: str = "coco"
    """How the annotations are written: `coco`, `voc`, `yolo`, `semantic`, `shapes`, or `package.module:name` of a
    `Format` of your own ([extend.md](extend.md))."""
    train: SplitConfig = field(default_factory=SplitConfig)
    """The training split."""
    val: SplitConfig | None = None
    """The validation split; `null`: this source is not evaluated."""
    classes: Any = None
    """`yolo`, `semantic`: a names file (JSON, YAML or one name a line) or a list of names. `coco`, `voc`: `null` takes
    all classes of the file, a list takes those (in that order)."""
    image_size: list[int] = field(default_factory=lambda: [800, 1333])
    """Short side and longest side that an image is resized to, in pixels."""
    augment: Any = "default"
    """`default` (horizontal flip, short side drawn in 0.8 … 1 of `image_size`), `none`, or a list of albumentations
    transforms, each `{type: Name, …its arguments}`."""
    weight: float = 1.0
    """How often this source takes its turn, relative to the others, when heads have different data."""
    views: int | None = None
    """So many augmented views of each image, seen in turn, one an epoch; `null`: a new one every epoch. The feature
    cache needs it unless images are at most flipped."""
    pad: Literal["batch", "source"] = "batch"
    """Pad training images to the largest of their batch, or of the whole source, which the feature cache needs where
    sizes differ."""
    aspect_grouping: bool = True
    """Put landscape and portrait images into different batches, so that less is padded."""
    ignore_index: int = 255
    """`semantic` only: the mask value that is neither trained nor evaluated."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an image that cannot be decoded: stop, or leave it out (deterministic, and counted)."""
    allow_leak: bool = False
    """`true`: some images of `train` may be in `val`, too. (A val split made of nothing else needs no leave: it shows
    whether a head can learn them by heart.)"""
    max_pixels: int = 89_478_485
    """Refuse larger images, from their header and before decoding (Pillow's limit, 1024³ / 4 / 3 pixels)."""


@dataclass
class HeadConfig:
    """The keys that every head takes; each head's own dataclass adds its arguments."""

    type: str
    """A name in `HEADS`, or `package.module:Class`."""
    data: str
    """The data source that this head learns from; heads that name the same one share its batches."""
    loss_weight: float = 1.0
    """Factor on all losses of this head."""
    threshold: float = 0.5
    """Least score of what is drawn and of `tools/predict.py`'s default output; evaluation does not use it."""
    allow_random: bool = False
    """`true`: let a head that is never trained keep its random weights."""


@dataclass
class PhaseConfig:
    """A stretch of the run with one set of frozen parts."""

    steps: int | None = None
    """Length in optimizer steps; only the last phase may leave it out."""
    freeze: list[str] = field(default_factory=list)
    """Submodules frozen in this phase: `backbone.stem`, `neck`, `heads.<name>`, …"""


@dataclass
class TrainConfig:
    """The loop."""

    steps: int | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = None
    """Passes over the data (over every data source at least) instead of `steps`."""
    batch_size: int = 16
    """Images per optimizer step over all processes: the number of processes never changes what is learned."""
    workers: int = 4
    """DataLoader worker processes of each process; 0 loads in the training process."""
    precision: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    """`bf16`, `fp16`: autocast with fp32 weights. `fp64`: all in double, for proofs."""
    accumulate: int = 1
    """Forward and backward passes that one optimizer step is split into."""
    grad_clip: float | None = None
    """Largest L2 norm of the gradient of everything that is trained; `null`: no clipping."""
    cache_features: Literal["off", "memory", "disk", "auto"] = "off"
    """Store what the frozen part puts out, once: `memory`, `disk`, or `auto` (if it fits and pays; says why if not)."""
    cache_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What features are stored as. `fp32` loses nothing; the others take half the space."""
    cache_dir: str | None = None
    """Where `disk` stores features; runs on the same frozen weights and images share them. `null`: `feature_cache`
    beside `output_dir`."""
    cache_limit_gb: float = 16.0
    """Most space that the features of a phase may take, in GB (10⁹ bytes)."""
    fold_frozen: Literal["auto", "off"] = "auto"
    """`auto`: training steps compute the frozen prefix with convolution and norm folded into copies."""
    compile: bool = False
    """Training steps run backbone and neck through `torch.compile`; a line says so where that fails."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step (no weight, average or statistic moves)."""
    max_skipped: int = 10
    """`on_nonfinite: skip`: stop after this many skipped steps in a row."""
    timeout_s: float = 300.0
    """Seconds that a process waits for the others before the run ends with an error."""


@dataclass
class OptimizerConfig:
    """Update rule; the parameter groups follow module types and names."""

    type: Literal["sgd", "adamw"] = "sgd"
    """`sgd` (with momentum) or `adamw`."""
    lr: float = 0.02
    """Learning rate for the whole `train.batch_size`."""
    momentum: float = 0.9
    """SGD's momentum."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's coefficients."""
    weight_decay: float = 1.0e-4
    """Weight decay of convolution and linear weights."""
    norm_weight_decay: float = 0.0
    """Weight decay of norm weights and of all biases, found by module type."""
    lr_mult: dict[str, float] = field(default_factory=dict)
    """Learning-rate factor by submodule name (`backbone: 0.1`); the longest matching name counts. To stop a part,
    freeze it."""


@dataclass
class ScheduleConfig:
    """Learning rate as a pure function of the step."""

    type: Literal["multistep", "cosine", "constant"] = "multistep"
    """`multistep`: times `gamma` at each milestone; `cosine`: to zero at the last step; `constant`."""
    milestones: list[int] = field(default_factory=list)
    """`multistep`: the steps at which the rate drops."""
    gamma: float = 0.1
    """`multistep`: the factor of each drop."""
    warmup_steps: int = 0
    """Linear warm-up from 1/1000 of the rate over this many steps."""


@dataclass
class EmaConfig:
    """Exponential moving average of what is trained."""

    decay: float = 0.9998
    """Weight of the old average at each optimizer step, below 1."""
    warmup_steps: int = 2000
    """The decay of update u is decay · (1 - exp(-u / warmup_steps)); 0: the full decay at once."""


@dataclass
class EvalConfig:
    """When and how to evaluate during training."""

    every: int | None = None
    """Every so many steps; the last step is always evaluated. `null`: only then."""
    weights: Literal["ema", "model", "both"] | None = None
    """Which weights to evaluate; `null`: `ema` if there is one, else `model`."""
    batch_size: int = 8
    """Images per evaluation batch of a process. Groups are formed the same for any number of processes."""
    engine: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """What computes COCO AP; both give the same numbers."""
    best: str | None = None
    """The metric that `best.pt` follows, such as `objects/bbox/AP`; `null`: the main metric of the first head that is
    trained and has a val split."""


@dataclass
class CheckpointConfig:
    """When to save."""

    every: int | None = None
    """Every so many steps; the last step is always saved. `null`: as `eval.every`, or only the last."""
    keep: int = 3
    """How many step checkpoints to keep (≥ 2); `last.pt` and `best.pt` come on top."""


@dataclass
class LogConfig:
    """What a person sees."""

    every: int = 20
    """Write `metrics.jsonl`, TensorBoard and the terminal every so many steps."""
    images: int = 8
    """How many validation images to draw at each evaluation; 0: none."""
    to: list[str] = field(default_factory=lambda: ["metrics", "tensorboard"])
    """Where numbers and pictures go: `metrics` (metrics.jsonl, always named: a resumed run reads it), `tensorboard`,
    or `package.module:Class` for a writer of one's own."""


@dataclass
class Config:
    """A whole run."""

    seed: int = 0
    """Sample order, augmentation and weights all follow from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if there is one."""
    output_dir: str = "runs/run"
    """The run folder."""
    init_from: str | None = None
    """A checkpoint: every matching tensor starts from it; heads it lacks start fresh; a report says which."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """See `backbone`."""
    neck: NeckConfig = field(default_factory=NeckConfig)
    """See `neck`."""
    data: dict[str, DataConfig] = field(default_factory=dict)
    """The data sources by name."""
    heads: dict[str, Any] = field(default_factory=dict)
    """The branches by name: `{type, data, …the head's own arguments}`; after loading, each is its head's config
    dataclass."""
    inherited_heads: list[str] = field(default_factory=list)
    """Filled in by the run: heads of `init_from` that the file does not list. They are kept to the bit, and evaluated
    by `tools/eval.py` alone."""
    freeze: list[str] = field(default_factory=list)
    """Submodules frozen for the whole run. Give this or `phases`."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """Phases in order, each with its own `freeze`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """See `train`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """See `optimizer`."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """See `schedule`."""
    ema: EmaConfig | None = field(default_factory=EmaConfig)
    """See `ema`; `null`: no average."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """See `eval`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """See `checkpoint`."""
    log: LogConfig = field(default_factory=LogConfig)
    """See `log`."""
