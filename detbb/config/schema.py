"""The configuration: one class a section, and beside each field its type, its range and what it means.

pydantic refuses what does not fit (detbb/config/loading.py says so to the user); `docs/config.md` and the JSON schema
for editors are made from here. What several keys must be together is in detbb/config/checks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    WrapValidator,
)

T = TypeVar("T")


def at_most(other: str) -> AfterValidator:
    """Refuses a value above that of the field `other`, which must be declared before."""

    def check(value: float, info: ValidationInfo) -> float:
        if other in info.data and value > info.data[other]:
            raise ValueError(f"must be at most {other} {info.data[other]}")
        return value

    return AfterValidator(check)


def rule(holds: Callable[[Any], bool], must: str) -> AfterValidator:
    """Refuses a value for which `holds` is false, in the words of `must`."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(must)
        return value

    return AfterValidator(check)


def in_words(must: str) -> WrapValidator:
    """Says what is valid in these words, where the type alone would not tell a person."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(must) from None

    return WrapValidator(check)


Norm = Literal["bn", "frozen_bn", "sync_bn", "gn"]
NonEmpty = Annotated[list[T], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NO_NAME_TWICE = rule(lambda names: not isinstance(names, list) or len(set(names)) == len(names), "must name none twice")
Classes = Annotated[
    NonEmpty[str] | Annotated[str, Field(min_length=1)] | None,
    in_words("must be a list of names, a names file or null"),
    NO_NAME_TWICE,
]
Augment = Annotated[
    Literal["default", "none"] | list[Annotated[dict[str, Any], rule(lambda t: isinstance(t.get("type"), str), "")]],
    in_words("must be default, none or a list of {type: Name, …its arguments}"),
]
ImageSize = Annotated[
    list[PositiveInt],
    rule(lambda s: len(s) == 2 and s[0] <= s[1], "must be [short side, longest side] with short <= longest"),
]


class Section(BaseModel):
    """A part of the configuration: plain attributes, made of exactly these keys and types."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


class BackboneConfig(Section):
    """The network that all branches share."""

    arch: str = "resnet50"
    """Any ResNet, ResNeXt or wide ResNet of torchvision: `resnet18|34|50|101|152`, `resnext50_32x4d`,
    `wide_resnet50_2`, …; or `package.module:Class`, see [docs/extend.md](extend.md)."""
    weights: str | None = None
    """`null` (random), `imagenet` (torchvision's, hash-checked; the only setting that may download), or a file
    (torchvision, Detectron2 or MMDetection naming; `.pth .pt .pkl .safetensors`)."""
    norm: Norm | None = "frozen_bn"
    """`bn`, `frozen_bn` (statistics and affine are constants), `sync_bn` (statistics over all processes) or `gn`;
    `null` for a backbone with norms of its own."""
    norm_eval: bool = False
    """`true`: running statistics stay fixed in the whole backbone (MMDetection's `norm_eval`)."""
    norm_affine: bool = True
    """`false`: norm weight and bias are not trained (MMDetection's `norm_cfg.requires_grad`)."""
    allow_random: bool = False
    """`true`: let `frozen_bn`, or a part that is never trained, keep its random weights."""


class NeckConfig(Section):
    """What turns backbone stages into feature levels."""

    type: Literal["fpn", "none"] = "fpn"
    """`fpn`: levels p2 … p7 and pool, as far as the heads ask for them; `none`: heads see the backbone's stages."""
    channels: PositiveInt = 256
    """Channels of every FPN level."""
    norm: Norm | None = None
    """A norm after each FPN convolution; `null`: a bias instead (the original FPN)."""
    norm_eval: bool = False
    """`true`: running statistics stay fixed in the neck."""
    norm_affine: bool = True
    """`false`: the neck's norm weight and bias are not trained."""
    allow_random: bool = False
    """`true`: let a neck that is never trained keep its random weights."""


class SplitConfig(Section):
    """Where one split of a data source is."""

    images: str | None = None
    """Folder of images. `shapes`: the folder to generate into (default `data/shapes`)."""
    annotations: str | None = None
    """`coco`: the JSON file; `voc`: the image-set file (its XML in `Annotations/`); `yolo`: the folder of txt labels;
    `semantic`: the folder of class-index PNG masks."""
    size: PositiveInt | None = None
    """`shapes` only: how many images to generate."""


class DataConfig(Section):
    """One data source: images and annotations of one class list."""

    format: str = "coco"
    """How the annotations are written: `coco`, `voc`, `yolo`, `semantic`, `shapes`, or `package.module:name` of a
    `Format` of your own ([extend.md](extend.md))."""
    train: SplitConfig = SplitConfig()
    """The training split."""
    val: SplitConfig | None = None
    """The validation split; `null`: this source is not evaluated."""
    classes: Classes = None
    """`yolo`, `semantic`: a names file (JSON, YAML or one name a line) or a list of names. `coco`, `voc`: `null` takes
    all classes of the file, a list takes those (in that order)."""
    keypoints: Annotated[list[str], NO_NAME_TWICE] | None = None
    """`yolo` only: names of the keypoints that follow each box; `[]`: there are none, longer lines are polygons;
    `null`: as `kpt_shape` in the file of `classes` says, else told from the lines."""
    image_size: ImageSize = [800, 1333]
    """Short side and longest side that an image is resized to, in pixels."""
    augment: Augment = "default"
    """`default` (horizontal flip, short side drawn in 0.8 … 1 of `image_size`), `none`, or a list of albumentations
    transforms, each `{type: Name, …its arguments}`."""
    weight: PositiveFloat = 1.0
    """How often this source takes its turn, relative to the others, when heads have different data."""
    views: PositiveInt | None = None
    """Number of augmented views of each image, seen in turn, one an epoch; `null`: a new view every epoch. The feature
    cache needs a number unless images are at most flipped."""
    pad: Literal["batch", "source"] = "batch"
    """Pad training images to the largest of their batch, or of the whole source, which the feature cache needs where
    sizes differ."""
    aspect_grouping: bool = True
    """Put landscape and portrait images into different batches, so that less is padded."""
    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    """`semantic` only: the mask value that is neither trained nor evaluated."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an image that cannot be decoded: stop, or leave it out (deterministic, and counted)."""
    allow_leak: bool = False
    """`true`: `val` may hold some images of `train`. (A `val` of nothing else is always allowed: it shows whether a
    head can learn them by heart.)"""
    allow_links: bool = False
    """`true`: images and labels may be symbolic links that lead out of their folder (as DVC and the Hugging Face hub
    make them)."""
    max_pixels: PositiveInt = 89_478_485
    """Refuse larger images, from their header and before decoding (Pillow's limit, 1024³ / 4 / 3 pixels)."""


class HeadConfig(Section):
    """The keys that every head takes; each head's own Config adds its arguments."""

    type: str
    """A name in `HEADS`, or `package.module:Class`."""
    data: str
    """The data source that this head learns from; heads that name the same one share its batches."""
    loss_weight: NonNegativeFloat = 1.0
    """Factor on all losses of this head."""
    threshold: Share = 0.5
    """Least score of what is drawn and of `tools/predict.py`'s default output; evaluation does not use it."""
    allow_random: bool = False
    """`true`: let a head that is never trained keep its random weights."""


class PhaseConfig(Section):
    """A stretch of the run with one set of frozen parts."""

    steps: PositiveInt | None = None
    """Length in optimizer steps; only the last phase may leave it out."""
    freeze: list[str] = []
    """Submodules frozen in this phase: `backbone.stem`, `neck`, `heads.<name>`, …"""


class TrainConfig(Section):
    """The training loop."""

    steps: PositiveInt | None = None
    """Optimizer steps. Give this or `epochs`."""
    epochs: PositiveFloat | None = None
    """Passes over the data (over every data source at least) instead of `steps`."""
    batch_size: PositiveInt = 16
    """Images per optimizer step over all processes: the number of processes never changes what is learned."""
    workers: NonNegativeInt = 4
    """DataLoader worker processes of each process; 0 loads in the training process."""
    precision: Literal["fp32", "fp64", "bf16", "fp16"] = "fp32"
    """`bf16`, `fp16`: autocast with fp32 weights. `fp64`: all in double, for proofs."""
    accumulate: PositiveInt = 1
    """Forward and backward passes that one optimizer step is split into."""
    grad_clip: PositiveFloat | None = None
    """Largest L2 norm of the gradient of everything that is trained; `null`: no clipping."""
    cache_features: Literal["off", "memory", "disk", "auto"] = "off"
    """Store the outputs of the frozen part, instead of computing them in every epoch: in `memory`, on `disk`, or `auto`
    (on `disk` if they fit and it pays). The log says why features are not stored."""
    cache_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of stored features. `fp32` loses nothing; the others take half the space."""
    cache_dir: str | None = None
    """Where `disk` stores features, in a folder `feature_cache`; runs on the same frozen weights and images share them.
    `null`: beside `output_dir`."""
    cache_limit_gb: PositiveFloat = 16.0
    """Most space that the features of a phase may take, in GB (10⁹ bytes)."""
    fold_frozen: Literal["auto", "off"] = "auto"
    """`auto`: training steps compute the frozen prefix with convolution and norm folded into copies."""
    compile: bool = False
    """Training steps run backbone and neck through `torch.compile`; a line says so where that fails."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step (no weight, average or statistic moves)."""
    max_skipped: PositiveInt = 10
    """`on_nonfinite: skip`: stop after this many skipped steps in a row."""
    timeout_s: PositiveFloat = 300.0
    """Seconds that a process waits for the others before the run ends with an error."""


class OptimizerConfig(Section):
    """Update rule; the parameter groups follow module types and names."""

    type: str = "sgd"
    """`sgd` (with momentum), `adamw`, or `package.module:function`."""
    lr: PositiveFloat = 0.02
    """Learning rate for the whole `train.batch_size`."""
    momentum: BelowOne = 0.9
    """SGD's momentum."""
    betas: Annotated[list[BelowOne], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """AdamW's coefficients."""
    weight_decay: NonNegativeFloat = 1.0e-4
    """Weight decay of convolution and linear weights."""
    norm_weight_decay: NonNegativeFloat = 0.0
    """Weight decay of norm weights and of all biases, found by module type."""
    lr_mult: dict[str, Annotated[float, rule(lambda f: f > 0, "must be above 0; to stop a part, freeze it")]] = {}
    """Learning-rate factor by submodule name (`backbone: 0.1`); the longest matching name counts. To stop a part,
    freeze it."""


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step."""

    type: str = "multistep"
    """`multistep`: times `gamma` at each milestone; `cosine`: to zero at the last step; `constant`; or
    `package.module:function`."""
    milestones: Annotated[list[PositiveInt], rule(lambda s: s == sorted(set(s)), "must be ascending")] = []
    """`multistep`: the steps at which the rate drops."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`multistep`: the factor of each drop."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up from 1/1000 of the rate over this many steps."""


class EmaConfig(Section):
    """Exponential moving average of what is trained."""

    decay: BelowOne = 0.9998
    """Weight of the old average at each optimizer step, below 1."""
    warmup_steps: NonNegativeInt = 2000
    """The decay of update u is decay · (1 - exp(-u / warmup_steps)); 0: the full decay at once."""


class EvalConfig(Section):
    """When and how to evaluate during training."""

    every: PositiveInt | None = None
    """Steps between evaluations; the last step is always evaluated. `null`: only the last."""
    weights: Literal["ema", "model", "both"] | None = None
    """Which weights to evaluate; `null`: `ema` if there is one, else `model`."""
    batch_size: PositiveInt = 8
    """Images per evaluation batch of a process. Groups are formed the same for any number of processes."""
    max_detections: PositiveInt = 100
    """How many detections of an image and class count for AP (COCO's limit is 100; 20 for keypoints). Metrics name it
    if it is another."""
    engine: Literal["hotcoco", "pycocotools"] = "hotcoco"
    """What computes COCO AP; both give the same numbers."""
    best: str | None = None
    """The metric that `best.pt` follows, such as `objects/bbox/AP`; `null`: the main metric of the first head that is
    trained and has a val split."""


class CheckpointConfig(Section):
    """When to save."""

    every: PositiveInt | None = None
    """Steps between checkpoints; the last step is always saved. `null`: as `eval.every`, or only the last."""
    keep: Annotated[int, Field(ge=2)] = 3
    """How many step checkpoints to keep (≥ 2); `last.pt` and `best.pt` come on top."""


class LogConfig(Section):
    """What a person sees."""

    every: PositiveInt = 20
    """Steps between lines of `metrics.jsonl`, TensorBoard and the terminal."""
    images: NonNegativeInt = 8
    """How many validation images to draw at each evaluation; 0: none."""
    to: list[str] = ["metrics", "tensorboard"]
    """Where numbers and pictures go: `metrics` (metrics.jsonl, always named: a resumed run reads it), `tensorboard`,
    or `package.module:Class` for a writer of one's own."""


class Config(Section):
    """A whole run."""

    seed: NonNegativeInt = 0
    """Sample order, augmentation and weights all follow from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if there is one."""
    output_dir: str = "runs/run"
    """The run folder."""
    init_from: str | None = None
    """A checkpoint, or a run folder (its best.pt, else last.pt): every matching tensor starts from it; heads it lacks
    start fresh; a report says which."""
    backbone: BackboneConfig = BackboneConfig()
    neck: NeckConfig = NeckConfig()
    data: dict[str, DataConfig] = {}
    """The data sources by name."""
    heads: dict[str, Any] = {}
    """The branches by name: `{type, data, …the head's own arguments}`; after loading, each is its head's
    Config."""
    inherited_heads: list[str] = []
    """Filled in by the run: heads of `init_from` that the file does not list. They are kept to the bit, and evaluated
    by `tools/eval.py` alone."""
    freeze: list[str] = []
    """Submodules frozen for the whole run. Give this or `phases`."""
    phases: list[PhaseConfig] = []
    """Phases in order, each with its own `freeze`."""
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig | None = EmaConfig()
    """Exponential moving average of what is trained; `null`: none."""
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def own_heads(self) -> dict[str, Any]:
        """The heads of this run: all but the inherited ones."""
        return {name: head for name, head in self.heads.items() if name not in self.inherited_heads}
