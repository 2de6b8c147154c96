"""The verbs of the command line: what each does, its arguments, and the function that runs it. Imports nothing heavy."""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from widefield.inference.names import HUB_PREFIX

Declaration = tuple[str, dict[str, Any]]
"""The name and the options that `ArgumentParser.add_argument` takes."""


@dataclass(frozen=True)
class Verb:
    """A verb, or one of its parts.

    Attributes:
        summary: Shown in the list of verbs.
        run: `package.module:function`. It is called with the arguments and with those that are not declared here, and returns
            the exit code, or None for 0.
        arguments: Declared beside `--verbose`.
        epilog: Shown below the arguments.
        takes_others: True if it takes undeclared arguments too, such as entries of a configuration.
        light: True if it has to answer at once, so that nothing is imported which it does not need itself.
        check: Like `run`, called before it and before torch is imported; raises what is wrong.
        usage: In place of the usage that argparse writes.
        parts: Verbs behind the verb, of which one has to be named.
    """

    summary: str
    run: str = ""
    arguments: tuple[Declaration, ...] = ()
    epilog: str = ""
    takes_others: bool = False
    light: bool = False
    check: str = "widefield.cli.first_checks:check_paths"
    usage: str | None = None
    parts: "Mapping[str, Verb]" = field(default_factory=dict)

    @property
    def description(self) -> str:
        """The summary as a sentence."""
        return f"{self.summary[0].upper()}{self.summary[1:]}."


def _option(name: str, metavar: str | None, text: str, kind: Callable[[str], Any] = str, **options: Any) -> Declaration:
    return name, {"metavar": metavar, "help": text, "type": _READERS.get(kind, kind), **options}


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, as in 3") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number, as in 0.25") from None


_READERS: dict[Callable[[str], Any], Callable[[str], Any]] = {int: _whole, float: _number}
"""In place of argparse's own, which say "invalid int value"."""


def _flag(name: str, text: str, **options: Any) -> Declaration:
    return name, {"action": "store_true", "help": text, **options}


def _columns(text: str) -> dict[str, Any]:
    """The names of columns by role from "{image: slide, label: grade}"."""
    import yaml

    try:
        columns = yaml.safe_load(text)
    except yaml.YAMLError:
        columns = None
    if not isinstance(columns, dict):
        raise argparse.ArgumentTypeError(f"{text!r} names no columns; give them as in '{{image: slide, label: grade}}'")
    return columns


def _names(text: str) -> list[str]:
    """The names in "[tree, house]"."""
    import yaml

    try:
        names = yaml.safe_load(text)
    except yaml.YAMLError:
        names = None
    if not isinstance(names, list) or not names:
        raise argparse.ArgumentTypeError(f"{text!r} names no classes; give them as in '[ground, tree]'")
    return [str(name) for name in names]


def _size(text: str) -> tuple[int, int]:
    """(height, width) from "97x113"."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give height and width as in 97x113")
    return int(match[1]), int(match[2])


def _count(text: str) -> int:
    """A number of things, of which there is at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least 1")
    return int(text)


def _passes(text: str) -> int:
    """A number of passes, which Lightning would repeat without an end where it is negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, at least 0, as in 20")
    return int(text)


def _sharing(text: str) -> int:
    """A number of processes; what follows a flag without one may be an entry of the configuration."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number of processes, at least 1; to let all share an image, give --split-images last"
        )
    return int(text)


def _formats(text: str) -> tuple[str, ...]:
    """Formats of heatmaps from "png,geojson"."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if wrong := [name for name in names if name not in HEATMAPS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no format; give some of {', '.join(HEATMAPS)}, with commas")
    return names


def _shares(text: str) -> tuple[float, ...]:
    """Numbers between 0 and 1 from "0.25,0.5"."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r} are no thresholds; give numbers between 0 and 1, as in 0.25,0.5")
    return shares


def checkpoint_argument(text: str) -> str | Path:
    """The name of a model on the Hugging Face Hub, or else the path of a file or folder."""
    return text if text.startswith(HUB_PREFIX) else Path(text)


def foreground_argument(text: str | Path) -> str | Path:
    """The name of a way to find the foreground, or else the path of a file or folder that says it."""
    return text if text in FOREGROUNDS else Path(text)


FOREGROUNDS = ("auto", "none", "otsu", "hsv")
"""Ways to find the foreground, see `widefield.images.ForegroundChoice`."""
TASKS = ("classification", "multilabel", "regression", "survival", "segment")
"""Tasks of `widefield fit`."""
POOLINGS = ("average", "max", "mean", "abmil", "clam", "clam-mb", "dsmil", "transmil", "abmilx")
"""The ways in which the map of an image becomes a vector, see `widefield.models.Classifier`."""
HEATMAPS = ("png", "tiff", "geojson")
"""Formats of heatmaps."""
_IMPORTS = _option(
    "--imports",
    "FILE",
    "a Python file (or module) with components of yours; may be given several times",
    action="append",
    default=[],
)
_IMAGES = _option("images", "IMAGES", "image files, or folders to search for them", Path, nargs="+")


def _foreground(default: str) -> Declaration:
    return _option(
        "--foreground",
        "METHOD",
        f"what is computed of an image: {', '.join(FOREGROUNDS)}, a GeoJSON file, or a folder with NAME.geojson for each image "
        f"(default: {default})",
        foreground_argument,
    )


_MEMORY_BUDGET = _option("--memory-budget", "SIZE", "such as 2GiB (default: chosen from the free memory)")
_RUN = (
    _option("--run", "DIR", "folder that `widefield fit` wrote", Path),
    _option("--config", "FILE", "configuration (default: that of --run)", Path, action="append", default=[]),
    _option("--checkpoint", "CKPT", "weights (default: last.ckpt in the folder of --run)", Path),
    _IMPORTS,
)
_MODEL = (
    _option("model", "MODEL", "which model, see below"),
    _option("--channels", "N", "of the image (default: what the first layer takes)", _count),
)
_PLAN = (
    _option("--tile-size", "N", "pixels per step of the plan (default: chosen)", _count),
    _option("--memory-budget", "SIZE", "of the plan, such as 2GiB (default: the free memory)"),
    _flag("--json", "print the result as JSON"),
)
_MODELS = """\
MODEL is one of
  my_file.py:model          an nn.Module in a file, or a class or function without required arguments that makes one
  package.module:attribute  the same in an installed module
  timm/NAME, torchvision/NAME
"""
_DATA = _option("--data", "PATH", "folder of images, or an image file; may be given several times", action="append")
_PRETRAINED = _option("--checkpoint", "CKPT", "a .ckpt file that `widefield pretrain` wrote, or `fit`", Path)
_CALL = (
    _option("--model", "MODEL", "my_file.py:MyWrapper, or a name such as torchvision/resnet18 or timm/convnext_tiny"),
    _flag("--overwrite", "replace what is there"),
    _IMPORTS,
)

REGISTRIES = {
    "datasets": "widefield.registry:DATASETS",
    "transforms": "widefield.registry:TRANSFORMS",
    "methods": "widefield.pretraining.methods:METHODS",
    "metrics": "widefield.components.metrics:METRICS",
}
"""Registries that `list` shows beside models, components and configurations."""


def _evaluation(images: str) -> Verb:
    return Verb(
        f"compute the metrics of a trained model on its {images} images",
        "widefield.cli.evaluate:run",
        (
            *_RUN,
            _option("--tta", "VIEWS", "metrics of scores averaged over views: hflip, vflip, crop=SIDE, with commas"),
            _option("--out", "FILE", "also write the numbers to this JSON file", Path),
        ),
        """\
Shows the loss, and the metrics under `metrics` in the configuration, such as `metrics=[{type: Accuracy, topk: [1, 5]}]`.
Entries of the configuration can be given as for `widefield fit`: `data.batch_size=8`, `trainer.precision=bf16-mixed`.
Without test images, `test` takes the validation images and shows what `fit` showed at its end.
""",
        takes_others=True,
    )


VERBS = {
    "fit": Verb(
        "train a network on whole images with one label each",
        "widefield.cli.fit:run",
        (
            _option("--images", "DIR", "folder of image files", Path),
            _option("--labels", "TABLE", "CSV or Parquet file with a row per image, see below", Path),
            _option(
                "--masks", "DIR", "for --task segment: folder of a label image or GeoJSON file for each image", Path
            ),
            _option(
                "--targets", "DIR", "for --task regression: folder of a map of numbers for each image, see below", Path
            ),
            _option(
                "--classes",
                "LIST",
                "for --task segment: names of the labels from 0, such as ground,tree (default: found)",
            ),
            _option(
                "--class-weights",
                "W",
                "for --task segment: balanced, by the pixels of each class, or a number for each (default: all alike)",
            ),
            _option(
                "--crop",
                "N",
                "for --masks and --targets: train on crops of N pixels a side (default: whole images)",
                _count,
            ),
            _option("--augment", "A", "for --crop: flips, or transforms such as '[{type: RandomAffine, degrees: 20}]'"),
            _option("--columns", "COLUMNS", "of the table, such as '{image: slide, label: grade}' (default: guessed)"),
            _option(
                "--task",
                "TASK",
                "classification, multilabel, regression, survival or segment (default: classification)",
                choices=TASKS,
            ),
            _option("--separator", "TEXT", "between several labels in one cell, for multilabel"),
            _option("--model", "NAME", "resnet18, ..., resnet18_w16, timm/NAME, or patches:timm/NAME, see below"),
            _option(
                "--features", "DIR", "folder of files of features (.h5, .zarr), in place of --images and --model", Path
            ),
            _option("--pooling", "NAME", f"{', '.join(POOLINGS)} (default: average)"),
            _option("--patch-size", "N", "side of a patch in pixels, with patches: (default: 224)", _count),
            _option("--lora", "RANK", "train adapters of this rank in an encoder of patches, not its weights", _count),
            _option("--out", "DIR", "folder of the checkpoints, the configuration and the report", Path),
            _flag("--resume", "continue the run in --out"),
            _option("--level", "N", "level of the image pyramids, 0 the largest (default: 0)", int),
            _option("--spacing", "UM", "micrometres per pixel instead of a level", float),
            _option("--channels", "LIST", "channels by index or name, such as 0,2 or DAPI (default: all)"),
            _foreground("auto"),
            _option("--value-range", "R", "what stands for 0 and 1: LOW,HIGH or dtype or percentiles (default: found)"),
            _option("--weights", "FILE", "weights to start from, or DEFAULT to download (default: random)"),
            _flag(
                "--cache-features", "compute the map of each image once, with a frozen trunk, and keep it", default=None
            ),
            _MEMORY_BUDGET,
            _option("--tile-size", "N", "pixels per step: N or [HEIGHT, WIDTH] (default: chosen)"),
            _option("--epochs", "N", "passes over the training images (default: 20)", _passes),
            _option("--batch-size", "N", "images per optimizer step (default: 1)", int),
            _option("--lr", "X", "learning rate of AdamW (default: 0.0001)", float),
            _option("--seed", "N", "of weights, split, order and crops (default: 0)", int),
            _option(
                "--split-images",
                "K",
                "let K processes share each image, see below; without a number, all",
                _sharing,
                nargs="?",
                const=True,
            ),
            _option("--config", "FILE", "configuration to start from", Path, action="append", default=[]),
            _IMPORTS,
        ),
        """\
A row of the table has the path of an image (in a column such as image, slide_id, filename, path), its label (label, class,
target), and maybe its split (split: train, val or test) and patient (case_id, patient_id, patient); --columns names others:
  --columns "{image: scan, label: grade}"
  --task multilabel --separator ";"                          labels in one cell
  --task multilabel --columns "{label: [necrosis, mitosis]}"  0 or 1 in each
  --task regression --columns "{label: age}"                  a number, or several as a list
  --task survival --columns "{time: months, event: died}"     1 where the event was observed, 0 where not until then

--task segment learns the class of each pixel from label maps of the names of the images, see docs/segmentation.md; --model is then
a segmentation model of torchvision, or timm/NAME:
  widefield fit --task segment --images scenes --masks labels --model timm/resnet18 --out out model.loss=dice
--task regression with --targets learns numbers for each pixel, from images of them (heights, densities, clean images):
  widefield fit --task regression --images noisy --targets clean --model timm/resnet18 --out out model.loss=l2

--foreground auto leaves out the background of slides of which a thumbnail shows less than half to be foreground, by Otsu's
threshold: it is not read and not computed, and poolings look at the rest. A slide has several levels or a known spacing, 4096
pixels or more on its long side, and is no map. otsu and hsv do so for every image, a GeoJSON file (of QuPath, say) holds its
polygons, and none takes images as they are. With auto, a network that needs whole images gets whole images.

Slides by patches: patches:timm/vit_small_patch16_224 encodes each patch by itself, and --pooling takes them as instances (abmil,
clam, clam-mb, dsmil, transmil, abmilx, mean, max), encoder and head end to end on whole slides. With --weights, pixels are
normalised as timm says for the encoder.
  widefield fit --images slides --labels labels.csv --model patches:timm/vit_small_patch16_224 --weights encoder.safetensors \\
      --pooling abmil --lora 8 --spacing 0.5 --foreground otsu --out out
  widefield fit ... --cache-features model.train_streaming_layers=false    encoder frozen, each slide encoded once
  widefield fit --features features/ --labels labels.csv --pooling clam --out out    features of CLAM, TRIDENT or `widefield embed`

The flags above are shortcuts for the most used entries of a LightningCLI configuration, which is saved as config.yaml in
the output folder. Every other entry can be given by its own name (`--trainer.precision bf16-mixed`,
`--trainer.accumulate_grad_batches 4`, `model.pooling=max`, `data.val_fraction=0.3`, with or without the dashes) or in a file
with --config, YAML or Python; what is given on the command line wins. A file may describe components by their `type`, and be
based on others with `_base_`; `widefield config check FILE` says what is wrong with it.
`metrics=[{type: Accuracy, topk: [1, 5]}]`, of those that `widefield list metrics` names, are computed in validation and test.
`optimizer={type: SGD, lr: 0.1}` is one of torch's, `lr_scheduler` one of its schedules or a list of them, one after the other:
`lr_scheduler=[{type: LinearLR, end: 5}, {type: CosineAnnealingLR, T_max: 95}]`; `paramwise_cfg={norm_decay_mult: 0.0}` sets some
parameters apart.
`loggers.csv={}`, jsonl, tensorboard, wandb and mlflow log the numbers of history.csv, with the arguments of Lightning's loggers:
`loggers.wandb.project=slides`.
`widefield fit --print_config` prints all entries with their defaults.

Several processes, one for each device, are started with torchrun (or with trainer.devices=4). Each trains on images of its own, or
with --split-images on a band of rows of an image that they share, two at a time with `--split-images 2` on 4 processes:
  torchrun --nproc-per-node 4 -m widefield fit --images slides --labels labels.csv --out out --split-images
""",
        takes_others=True,
        check="widefield.cli.first_checks:check_fit",
    ),
    "pretrain": Verb(
        "train a model on images without labels, by a self-supervised method",
        "widefield.cli.call:run",
        (
            _option("--out", "DIR", "folder of the run, new or empty", Path),
            _DATA,
            _option("--method", "NAME", "(default: simclr)"),
            _option("--epochs", "N", "passes over the images (default: 100)", int),
            _option("--batch-size", "N", "images of a step (default: 128)", int),
            _option("--seed", "N", "of all that is drawn (default: 0)", int),
            _option("--spacing", "UM", "micrometres per pixel of patches of slides", float, dest="slides.spacing"),
            _flag("--resume", "continue the run in --out", dest="resume_interrupted"),
            *_CALL,
        ),
        """\
Every other argument of widefield.pretrain is given as key=value, with dots for entries of dictionaries; a value is YAML:
  widefield pretrain --out out/run --data images --model torchvision/resnet18 method=dino optim_args.lr=0.1
  widefield pretrain --out out/run --data images --model my_file.py:MyWrapper transform_args.image_size=128 \\
      loggers.tensorboard=null
`widefield list methods` shows the methods; --imports FILE brings one of yours.
""",
        takes_others=True,
        check="widefield.cli.first_checks:check_call",
    ),
    "export": Verb(
        "write the trained model of a checkpoint of `pretrain` or `fit` to a file of its own",
        "widefield.cli.call:run",
        (
            _option("--out", "FILE", "file that is written", Path),
            _PRETRAINED,
            _option("--part", "PART", "model, wrapped_model, embedding_model or adapters (default: model)"),
            _option("--format", "FORMAT", "(default: package_default, a state dict)"),
            *_CALL,
        ),
        """\
Formats: package_default, torch_state_dict, torch_model (the module itself, pickled), safetensors; and the whole model as a graph:
onnx (needs widefield[onnx]) and torch_export, for images of any height and width, or with image_size=[H, W] of this size alone. A
graph is run on random images and compared with the model; the largest difference is told, and no file is left that differs.
Of a checkpoint of `fit` a graph takes images as they are stored and gives logits; of `pretrain`, images normalised already.
Only torch_model, onnx and torch_export need --model, and only if the run was not given its model by name.
Of a checkpoint of `fit`, model is the network under timm's or torchvision's names, or the encoder of patches with adapters merged;
adapters are those of --lora alone, written to the folder --out, which peft.PeftModel.from_pretrained reads.
Arguments of widefield.export may also be given as key=value.
""",
        takes_others=True,
        check="widefield.cli.first_checks:check_call",
    ),
    "embed": Verb(
        "write the embeddings of images by a checkpoint of `pretrain`",
        "widefield.cli.call:run",
        (
            _option("--out", "FILE", "file that is written; with --patches the folder of the files", Path),
            _DATA,
            _PRETRAINED,
            _flag("--patches", "write the features of the patches of each slide to a file of its own, see below"),
            _option("--format", "FORMAT", "(default: torch; with --patches hdf5)"),
            _option("--batch-size", "N", "images at a time (default: 128)", int),
            _option("--spacing", "UM", "micrometres per pixel of slides as a whole, with image_size=null", float),
            _foreground("auto, of slides as a whole"),
            *_CALL,
        ),
        """\
Formats: torch, csv, lightly_csv, parquet. Images of any size are resized to image_size (default: [224, 224]).
Every other argument of widefield.embed is given as key=value, such as image_size=128 or num_workers=4. Slides, each as a whole:
image_size=null level=1 streaming.memory_budget=2GiB; their background is left out as --foreground of `widefield fit` says.
Patches of slides (slides.patch_size=256) are those with foreground anyway.

--patches writes features (n, D) and coords (n, 2) of the patches with foreground, as CLAM and TRIDENT do, by an encoder of timm or
that of a run of `fit`; format=zarr has the same arrays. `widefield fit --features` trains on them. Slides whose file is there are
left out.
  widefield embed --patches --out features --data slides --model patches:timm/vit_small_patch16_224 weights=encoder.safetensors \\
      --spacing 0.5 patch_size=224
  widefield embed --patches --out features --data slides --checkpoint runs/first/best.ckpt
""",
        takes_others=True,
        check="widefield.cli.first_checks:check_call",
    ),
    "doctor": Verb(
        "read every image of a folder once, and tell what is there and what is wrong",
        "widefield.cli.doctor:run",
        (
            _option("--images", "DIR", "folder of images, searched with all folders below", Path, required=True),
            _option("--labels", "TABLE", "label table, as for `widefield fit`", Path),
            _option(
                "--columns",
                "COLUMNS",
                "of the table, such as '{image: slide, label: grade}' (default: guessed)",
                _columns,
            ),
            _option("--task", "TASK", "as for `widefield fit` (default: classification)", default="classification"),
            _option("--masks", "DIR", "folder of label maps, as for `widefield fit --task segment`", Path),
            _option("--classes", "LIST", "names of their labels from 0, such as [ground, tree]", _names),
            _option("--out", "CSV", "write what was found of each image here", Path),
            _option("--workers", "N", "images that are read at a time (default: one for each processor)", _count),
        ),
        """\
The table has a row for each image: whether it opens and reads to its end, size, channels, type, levels, spacing, least and greatest
value, the share of pixels without data, its label, and the image that has the same pixels; its label map, and the share of each
label in it. The exit code is 1 if an image or a label map cannot be read, if the images and the label table do not name each other,
if a label map has another size than its image or labels that are no class, or if an image has none.
""",
    ),
    "validate": _evaluation("validation"),
    "test": _evaluation("test"),
    "predict": Verb(
        "classify images with a checkpoint, and show where the evidence lies",
        "widefield.cli.predict:run",
        (
            _option(
                "--checkpoint",
                "CKPT",
                "a .ckpt file that `widefield fit` wrote, a folder that widefield.save_pretrained wrote, or hf-hub:OWNER/NAME",
                checkpoint_argument,
                required=True,
            ),
            _option("--config", "FILE", "of a model of components (default: config.yaml beside the checkpoint)", Path),
            _IMAGES,
            _option("--out", "DIR", "(default: ./predictions)", Path, default=Path("predictions")),
            _flag("--resume", "go on in --out: leave out the images that have a prediction there"),
            _option("--level", "N", "level of the image pyramids (default: that of the training)", int),
            _option("--spacing", "UM", "micrometres per pixel (default: that of the training)", float),
            _foreground("that of the training"),
            _MEMORY_BUDGET,
            _option("--tile-size", "N", "pixels per step (default: chosen)", _count),
            _option("--tta", "VIEWS", "average over views: hflip, vflip, crop=SIDE, with commas"),
            _option(
                "--heatmap", "FORMATS", "png, tiff, geojson, with commas (default: png)", _formats, default=("png",)
            ),
            _option(
                "--thresholds",
                "SHARES",
                "of the greatest evidence, for geojson (default: 0.5)",
                _shares,
                default=(0.5,),
            ),
            _IMPORTS,
        ),
        """\
Writes predictions.csv: image, a probability per class, the predicted class, where the evidence for it is greatest (in pixels of
the largest level, and in micrometres from the corner), the share of the computation that was skipped as background (`skipped`, see
--foreground of `widefield fit`), the files with heatmaps, and the error of an image that failed. Folders are searched with all
below. Each row is on disk before the next image is read; where one fails, the others go on, and the exit code is 2.

Where the model has a map of the image, the evidence for the predicted class is written as
  png      the image with the evidence over it, and what lies where it is greatest at full resolution
  tiff     a pyramidal OME-TIFF of the evidence as float32, in the image's place and with its spacing; of a map a GeoTIFF with its
           coordinate reference system, which needs widefield[geo]
  geojson  annotations for QuPath: contours of the evidence above --thresholds
There is no evidence where the image holds no data (NaN, or the value that the file names for missing data), nor in the background
that was left out.
""",
    ),
    "visualize": Verb(
        "draw where a class was seen, how features lie, how a learning rate goes, what is mistaken for what",
        epilog="`widefield visualize cam --help` and so on show the arguments of each picture.\n",
        parts={
            "cam": Verb(
                "where in an image a class was seen, at any layer (Grad-CAM)",
                "widefield.cli.draw:draw_cam",
                (
                    _IMAGES,
                    _option("--checkpoint", "CKPT", "a .ckpt file, or the folder of its run", Path, required=True),
                    _option("--layer", "NAME", "such as backbone.layer3 (default: the backbone's last map)"),
                    _option("--class", "CLASS", "name or index (default: the predicted one)", dest="label"),
                    _option("--out", "DIR", "(default: ./cam)", Path, default=Path("cam")),
                    _IMPORTS,
                ),
            ),
            "tsne": Verb(
                "features of labelled images as points in a plane (t-SNE)",
                "widefield.cli.draw:draw_tsne",
                (
                    *_RUN,
                    _option(
                        "--stage",
                        None,
                        "(default: backbone)",
                        choices=("backbone", "neck", "pre_logits"),
                        default="backbone",
                    ),
                    _option(
                        "--split", None, "which images (default: val)", choices=("train", "val", "test"), default="val"
                    ),
                    _option("--count", "N", "at most so many images (default: 1000)", int, default=1000),
                    _option("--perplexity", "X", "neighbours that count (default: 30, or less)", float),
                    _option("--out", "PNG", "(default: tsne.png)", Path, default=Path("tsne.png")),
                ),
                takes_others=True,
            ),
            "schedule": Verb(
                "the learning rate of every epoch",
                "widefield.cli.draw:draw_schedule",
                (
                    _option("--config", "FILE", "configuration", Path, action="append", required=True),
                    _option(
                        "--steps-per-epoch",
                        "N",
                        "optimizer steps, for a schedule that goes on with each of them",
                        _count,
                    ),
                    _option("--out", "PNG", "(default: schedule.png)", Path, default=Path("schedule.png")),
                    _IMPORTS,
                ),
                takes_others=True,
            ),
            "confusion": Verb(
                "which classes are taken for which, on test images",
                "widefield.cli.draw:draw_confusion",
                (
                    *_RUN,
                    _option("--out", "PNG", "(default: confusion.png)", Path, default=Path("confusion.png")),
                ),
                takes_others=True,
            ),
        },
    ),
    "check": Verb(
        "see whether a model streams exactly, and what a large image would need",
        "widefield.cli.inspect_model:check_model",
        (
            *_MODEL,
            _option("--size", "HxW", "compared (default: 97x113, or two windows of Local)", _size),
            _option("--plan-size", "HxW", "planned for (default: 8192x8192)", _size, default=(8192, 8192)),
            *_PLAN,
            _flag("--explain", "tell what each pass over the model's operations makes, and every layer"),
        ),
        f"""\
{_MODELS}
It is compared with plain PyTorch on a small random image, in float64: outputs, the image's gradient, every parameter's gradient.
Exit code: 0 exact, 1 not exact (wrong, refused, or streamed in part), 2 an error such as a file that is not there.
""",
    ),
    "plan": Verb(
        "show the tile, steps and memory that an image of some size takes, and the geometry of every layer",
        "widefield.cli.inspect_model:plan_image",
        (
            *_MODEL,
            _option("--size", "HxW", "of the image, such as 80000x100000", _size, required=True),
            _option("--batch", "N", "images at a time (default: 1)", _count, default=1),
            _flag("--inference", "plan a forward pass (default: a training step)"),
            *_PLAN,
        ),
        f"""\
{_MODELS}
No pixel is computed. Of every layer that reads windows you see its receptive field and its stride in pixels of the image, the rows
that it carries from one tile row to the next, and how many rows and columns at the borders of its output read padding: what a
tiling with halos would lose at the borders of a tile as large as the image.
""",
    ),
    "bench": Verb(
        "measure time and memory of a model on this machine: plain, streamed, and by peers that are installed",
        "widefield.cli.bench:run",
        (
            _option(
                "--model", "MODEL", "see below; several times (default: two small ones)", action="append", default=[]
            ),
            _option("--size", "N", "height and width of the image; several times", _count, action="append", default=[]),
            _option("--device", "DEVICE", "cpu or cuda (default: cpu)", choices=("cpu", "cuda"), default="cpu"),
            _option(
                "--dtype",
                "DTYPE",
                "float32, or bfloat16 for autocast (default: float32)",
                choices=("float32", "bfloat16"),
                default="float32",
            ),
            _option("--budget", "SIZE", "a share of plain's peak such as 1/4, or 2GiB; several times", action="append"),
            _option("--repeats", "N", "passes of which the median is taken (default: 3)", _count, default=3),
            _flag("--all", "all networks that marks are set for, which takes an hour on a CPU"),
            _flag("--largest", "look for the largest image of which a training step fits, plain and streamed, instead"),
            _option("--json", "FILE", "also write the numbers to this file", Path),
        ),
        f"""\
{_MODELS}
A forward pass without gradients and a training step are measured, in evaluation mode. Ways take turns in one process; seconds are
medians. Memory is the peak above the weights, their gradients and the image: on a CPU of a process of its own for each way. Where
plain PyTorch is faster in channels_last, all ways have it. Streamed runs get shares of plain's peak, or of the machine's memory if
plain PyTorch does not fit. Measure on an idle machine: short steps suffer most from other processes.

Peers: torch.utils.checkpoint in training steps; lightstream on ResNets of torchvision (beside which norm layers are frozen), from
1312 pixels on; MONAI's sliding window (not exact) where the result is a map of the image's size; diffusers' tiling (not exact).
  widefield bench --model torchvision/resnet50 --size 4096 --device cuda --dtype bfloat16 --budget 1/2 --budget 1/4 --json new.json
  widefield bench --model timm/resnet50 --device cuda --largest
""",
    ),
    "list": Verb(
        "list models, components, methods of pretraining or ready configurations by name",
        "widefield.cli.lookup:list_names",
        (
            _option("what", None, "what is listed", choices=("models", "components", "configs", *REGISTRIES)),
            _option("pattern", "PATTERN", "only names that match", nargs="?", default="*"),
            _option("--kind", "KIND", "only components of this kind, such as backbone"),
            _IMPORTS,
        ),
        """\
PATTERN may have * and ?; without them it is any part of a name.
`widefield help NAME` shows the arguments of a component.
""",
        light=True,
    ),
    "help": Verb(
        "show the arguments of a component, with their types, defaults and docs",
        "widefield.cli.lookup:show_help",
        (
            _option(
                "name",
                "NAME",
                "a component, data set, transform, metric or method, an import path of a class, or a verb",
                nargs="?",
            ),
            _IMPORTS,
        ),
        "`widefield list components` shows the names; so do `list datasets`, `list transforms`, `list metrics` and `list methods`.",
        light=True,
    ),
    "config": Verb(
        "show a configuration with all that it is based on, check it, or convert one of MMPretrain",
        "widefield.cli.lookup:show_config",
        (
            _option(
                "what",
                None,
                "show it, see whether it can be used, or convert it",
                choices=("print", "check", "convert"),
            ),
            _option("file", "FILE", "YAML or Python file; of several, each goes over the last"),
            _option("--out", "NEW", "YAML file that convert writes (default: shows it)", Path),
            _flag("--timm", "convert a backbone that is not here to one of timm"),
            _IMPORTS,
        ),
        """\
path=value, such as model.backbone.depth=34 or trainer.max_epochs=3, goes over the files; a value is YAML.

print shows the whole configuration, with what it is based on. check compares every value with the constructor that gets it, and
makes all but the data sets once: model, metrics, transforms, optimizer, schedule, trainer. No data is read.
convert writes a configuration of MMPretrain, with the files that it is based on, as one of ours, and lists what is not the same.
It is read, and not run. Where its backbone is not here, the network of timm that takes its place is named, and taken with --timm.
Exit code: 0 fine, 1 something is wrong with the configuration, 2 another error such as a file that is not there.
""",
        takes_others=True,
        light=True,
        usage=(
            "widefield config {print,check} FILE [FILE ...] [--imports FILE] [path=value ...]\n"
            "       widefield config convert OLD [--out NEW] [--timm] [--imports FILE]"
        ),
    ),
    "demo": Verb(
        "make a small set of large images, train on them, predict, and write a report",
        "widefield.cli.demo:run",
        (
            _option("--out", "DIR", "(default: ./widefield-demo)", Path, default=Path("widefield-demo")),
            _option("--seed", "N", "of the images and the training (default: 0)", int, default=0),
        ),
        """\
Makes pyramidal TIFFs of 1152 x 1152 pixels from photographs that scikit-image ships, labelled by marks that a thumbnail
loses; then runs `widefield fit` and `widefield predict` on them, and on their thumbnails for comparison. Takes some
100 CPU-seconds, needs no GPU and downloads nothing.
""",
    ),
}
