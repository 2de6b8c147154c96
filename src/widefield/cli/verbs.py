"""The verbs of the command line: what each does, its arguments, and the function that runs it. Imports nothing heavy."""

from pathlib import Path

from widefield.cli.training_verbs import EMBED, EXPORT, FIT, PRETRAIN
from widefield.cli.verb import (
    IMAGES,
    IMPORTS,
    MEMORY_BUDGET,
    Verb,
    checkpoint_argument,
    flag,
    foreground,
    option,
    read_columns,
    read_count,
    read_formats,
    read_names,
    read_shares,
    read_size,
)

_RUN = (
    option("--run", "DIR", "folder that `widefield fit` wrote", Path),
    option("--config", "FILE", "configuration (default: that of --run)", Path, action="append", default=[]),
    option("--checkpoint", "CKPT", "weights (default: last.ckpt in the folder of --run)", Path),
    IMPORTS,
)
_MODEL = (
    option("model", "MODEL", "which model, see below"),
    option("--channels", "N", "of the image (default: what the first layer takes)", read_count),
)
_PLAN = (
    option("--tile-size", "N", "pixels per step of the plan (default: chosen)", read_count),
    option("--memory-budget", "SIZE", "of the plan, such as 2GiB (default: half of the free memory)"),
    flag("--json", "print the result as JSON"),
)
_MODELS = """\
MODEL is one of
  my_file.py:model          an nn.Module in a file, or a class or function without required arguments that makes one
  package.module:attribute  the same in an installed module
  timm/NAME, torchvision/NAME
"""
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
            option("--tta", "VIEWS", "metrics of scores averaged over views: hflip, vflip, crop=SIDE, with commas"),
            option("--out", "FILE", "also write the numbers to this JSON file", Path),
        ),
        """\
Shows the loss, and the metrics under `metrics` in the configuration, such as `metrics=[{type: Accuracy, topk: [1, 5]}]`.
Entries of the configuration can be given as for `widefield fit`: `data.batch_size=8`, `trainer.precision=bf16-mixed`.
Without test images, `test` takes the validation images and shows what `fit` showed at its end.
""",
        takes_others=True,
    )


VERBS = {
    "fit": FIT,
    "pretrain": PRETRAIN,
    "export": EXPORT,
    "embed": EMBED,
    "doctor": Verb(
        "read every image of a folder once, and tell what is there and what is wrong",
        "widefield.cli.doctor:run",
        (
            option("--images", "DIR", "folder of images, searched with all folders below", Path, required=True),
            option("--labels", "TABLE", "label table, as for `widefield fit`", Path),
            option(
                "--columns",
                "COLUMNS",
                "of the table, such as '{image: slide, label: grade}' (default: guessed)",
                read_columns,
            ),
            option("--task", "TASK", "as for `widefield fit` (default: classification)", default="classification"),
            option("--masks", "DIR", "folder of label maps, as for `widefield fit --task segment`", Path),
            option("--classes", "LIST", "names of their labels from 0, such as [ground, tree]", read_names),
            option("--out", "CSV", "write what was found of each image here", Path),
            option("--workers", "N", "images that are read at a time (default: one for each processor)", read_count),
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
            option(
                "--checkpoint",
                "CKPT",
                "a .ckpt file that `widefield fit` wrote, a folder that widefield.save_pretrained wrote, or hf-hub:OWNER/NAME",
                checkpoint_argument,
                required=True,
            ),
            option("--config", "FILE", "of a model of components (default: config.yaml beside the checkpoint)", Path),
            IMAGES,
            option("--out", "DIR", "(default: ./predictions)", Path, default=Path("predictions")),
            flag("--resume", "go on in --out: leave out the images that have a prediction there"),
            option("--level", "N", "level of the image pyramids (default: that of the training)", int),
            option("--spacing", "UM", "micrometres per pixel (default: that of the training)", float),
            foreground("that of the training"),
            MEMORY_BUDGET,
            option("--tile-size", "N", "pixels per step (default: chosen)", read_count),
            option("--tta", "VIEWS", "average over views: hflip, vflip, crop=SIDE, with commas"),
            option(
                "--heatmap", "FORMATS", "png, tiff, geojson, with commas (default: png)", read_formats, default=("png",)
            ),
            option(
                "--thresholds",
                "SHARES",
                "of the greatest evidence, for geojson (default: 0.5)",
                read_shares,
                default=(0.5,),
            ),
            IMPORTS,
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
                    IMAGES,
                    option("--checkpoint", "CKPT", "a .ckpt file, or the folder of its run", Path, required=True),
                    option("--layer", "NAME", "such as backbone.layer3 (default: the backbone's last map)"),
                    option("--class", "CLASS", "name or index (default: the predicted one)", dest="label"),
                    option("--out", "DIR", "(default: ./cam)", Path, default=Path("cam")),
                    IMPORTS,
                ),
            ),
            "tsne": Verb(
                "features of labelled images as points in a plane (t-SNE)",
                "widefield.cli.draw:draw_tsne",
                (
                    *_RUN,
                    option(
                        "--stage",
                        None,
                        "(default: backbone)",
                        choices=("backbone", "neck", "pre_logits"),
                        default="backbone",
                    ),
                    option(
                        "--split", None, "which images (default: val)", choices=("train", "val", "test"), default="val"
                    ),
                    option("--count", "N", "at most so many images (default: 1000)", int, default=1000),
                    option("--perplexity", "X", "neighbours that count (default: 30, or less)", float),
                    option("--out", "PNG", "(default: tsne.png)", Path, default=Path("tsne.png")),
                ),
                takes_others=True,
            ),
            "schedule": Verb(
                "the learning rate of every epoch",
                "widefield.cli.draw:draw_schedule",
                (
                    option("--config", "FILE", "configuration", Path, action="append", required=True),
                    option(
                        "--steps-per-epoch",
                        "N",
                        "optimizer steps, for a schedule that goes on with each of them",
                        read_count,
                    ),
                    option("--out", "PNG", "(default: schedule.png)", Path, default=Path("schedule.png")),
                    IMPORTS,
                ),
                takes_others=True,
            ),
            "confusion": Verb(
                "which classes are taken for which, on test images",
                "widefield.cli.draw:draw_confusion",
                (*_RUN, option("--out", "PNG", "(default: confusion.png)", Path, default=Path("confusion.png"))),
                takes_others=True,
            ),
        },
    ),
    "check": Verb(
        "see whether a model streams exactly, and what a large image would need",
        "widefield.cli.inspect_model:check_model",
        (
            *_MODEL,
            option("--size", "HxW", "compared (default: 97x113, or two windows of Local)", read_size),
            option("--plan-size", "HxW", "planned for (default: 8192x8192)", read_size, default=(8192, 8192)),
            *_PLAN,
            flag("--explain", "tell what each pass over the model's operations makes, and every layer"),
        ),
        f"""\
{_MODELS}
It is compared with plain PyTorch on a small random image, in float64: outputs, the image's gradient, every parameter's gradient.
Exit code: 0 exact, and streamed at least up to its first operation on tokens; 1 not so (wrong, refused, or streamed in part); 2 an
error such as a file that is not there.
""",
    ),
    "plan": Verb(
        "show the tile, steps and memory that an image of some size takes, and the geometry of every layer",
        "widefield.cli.inspect_model:plan_image",
        (
            *_MODEL,
            option("--size", "HxW", "of the image, such as 80000x100000", read_size, required=True),
            option("--batch", "N", "images at a time (default: 1)", read_count, default=1),
            flag("--inference", "plan a forward pass (default: a training step)"),
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
            option(
                "--model",
                "MODEL",
                "see below; several times (default: ResNet-18 and EfficientNet-B0)",
                action="append",
                default=[],
            ),
            option(
                "--size", "N", "height and width of the image; several times", read_count, action="append", default=[]
            ),
            option("--device", "DEVICE", "cpu or cuda (default: cpu)", choices=("cpu", "cuda"), default="cpu"),
            option(
                "--dtype",
                "DTYPE",
                "float32, or bfloat16 for autocast (default: float32)",
                choices=("float32", "bfloat16"),
                default="float32",
            ),
            option("--budget", "SIZE", "a share of plain's peak such as 1/4, or 2GiB; several times", action="append"),
            option("--repeats", "N", "passes of which the median is taken (default: 3)", read_count, default=3),
            flag("--all", "without --model: all networks that marks are set for, which takes hours on a CPU"),
            flag("--largest", "look for the largest image of which a training step fits, plain and streamed, instead"),
            option("--json", "FILE", "also write the numbers to this file", Path),
        ),
        f"""\
{_MODELS}
A forward pass without gradients and a training step are measured, in evaluation mode. Ways take turns, on a CPU each in a process
of its own, after ten seconds of passes each that are not counted; seconds are medians. Memory is the peak of all passes above the
weights, their gradients and the image. Where plain PyTorch is faster in channels_last, all ways have it. Streamed runs get shares
of plain's peak, or of the machine's memory if plain PyTorch does not fit. Measure on an idle machine: short steps suffer most from
other processes.

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
            option("what", None, "what is listed", choices=("models", "components", "configs", *REGISTRIES)),
            option("pattern", "PATTERN", "only names that match", nargs="?", default="*"),
            option("--kind", "KIND", "only components of this kind, such as backbone"),
            IMPORTS,
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
            option(
                "name",
                "NAME",
                "a component, data set, transform, metric or method, an import path of a class, or a verb",
                nargs="?",
            ),
            IMPORTS,
        ),
        "`widefield list components` shows the names; so do `list datasets`, `list transforms`, `list metrics` and `list methods`.",
        light=True,
    ),
    "config": Verb(
        "show a configuration with all that it is based on, check it, or convert one of MMPretrain",
        "widefield.cli.lookup:show_config",
        (
            option(
                "what",
                None,
                "show it, see whether it can be used, or convert it",
                choices=("print", "check", "convert"),
            ),
            option("file", "FILE", "YAML or Python file; of several, each goes over the last"),
            option("--out", "NEW", "YAML file that convert writes (default: shows it)", Path),
            flag("--timm", "convert a backbone that is not here to one of timm"),
            IMPORTS,
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
            option("--out", "DIR", "(default: ./widefield-demo)", Path, default=Path("widefield-demo")),
            option("--seed", "N", "of the images and the training (default: 0)", int, default=0),
        ),
        """\
Makes pyramidal TIFFs of 1152 x 1152 pixels from photographs that scikit-image ships, labelled by marks that a thumbnail
loses; then runs `widefield fit` and `widefield predict` on them, and on their thumbnails for comparison. Takes some
100 CPU-seconds, needs no GPU and downloads nothing.
""",
    ),
}
