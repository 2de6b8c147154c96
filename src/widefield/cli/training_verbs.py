"""The verbs that train, and those that write what was learned: `fit`, `pretrain`, `export`, `embed`."""

from pathlib import Path

from widefield.cli.verb import (
    IMPORTS,
    MEMORY_BUDGET,
    Verb,
    flag,
    foreground,
    option,
    read_count,
    read_passes,
    read_sharing,
)

TASKS = ("classification", "multilabel", "regression", "survival", "segment")
"""Tasks of `widefield fit`."""
POOLINGS = ("average", "max", "mean", "abmil", "clam", "clam-mb", "dsmil", "transmil", "abmilx")
"""The ways in which the map of an image becomes a vector, see `widefield.models.Classifier`."""
_DATA = option("--data", "PATH", "folder of images, or an image file; may be given several times", action="append")
_PRETRAINED = option("--checkpoint", "CKPT", "a .ckpt file that `widefield pretrain` wrote, or `fit`", Path)
_CALL = (
    option("--model", "MODEL", "my_file.py:MyWrapper, or a name such as torchvision/resnet18 or timm/convnext_tiny"),
    flag("--overwrite", "replace what is there"),
    IMPORTS,
)

FIT = Verb(
    "train a network on whole images with one label each",
    "widefield.cli.fit:run",
    (
        option("--images", "DIR", "folder of image files", Path),
        option("--labels", "TABLE", "CSV or Parquet file with a row per image, see below", Path),
        option("--masks", "DIR", "for --task segment: folder of a label image or GeoJSON file for each image", Path),
        option("--targets", "DIR", "for --task regression: folder of a map of numbers for each image, see below", Path),
        option(
            "--classes", "LIST", "for --task segment: names of the labels from 0, such as ground,tree (default: found)"
        ),
        option(
            "--class-weights",
            "W",
            "for --task segment: balanced, by the pixels of each class, or a number for each (default: all alike)",
        ),
        option(
            "--crop",
            "N",
            "for --masks and --targets: train on crops of N pixels a side (default: whole images)",
            read_count,
        ),
        option("--augment", "A", "for --crop: flips, or transforms such as '[{type: RandomAffine, degrees: 20}]'"),
        option("--columns", "COLUMNS", "of the table, such as '{image: slide, label: grade}' (default: guessed)"),
        option(
            "--task",
            "TASK",
            "classification, multilabel, regression, survival or segment (default: classification)",
            choices=TASKS,
        ),
        option("--separator", "TEXT", "between several labels in one cell, for multilabel"),
        option("--model", "NAME", "resnet18, ..., resnet18_w16, timm/NAME, or patches:timm/NAME, see below"),
        option("--features", "DIR", "folder of files of features (.h5, .zarr), in place of --images and --model", Path),
        option("--pooling", "NAME", f"{', '.join(POOLINGS)} (default: average)"),
        option("--patch-size", "N", "side of a patch in pixels, with patches: (default: 224)", read_count),
        option("--lora", "RANK", "train adapters of this rank in an encoder of patches, not its weights", read_count),
        option("--out", "DIR", "folder of the checkpoints, the configuration and the report", Path),
        flag("--resume", "continue the run in --out"),
        option("--level", "N", "level of the image pyramids, 0 the largest (default: 0)", int),
        option("--spacing", "UM", "micrometres per pixel instead of a level", float),
        option("--channels", "LIST", "channels by index or name, such as 0,2 or DAPI (default: all)"),
        foreground("auto"),
        option("--value-range", "R", "what stands for 0 and 1: LOW,HIGH or dtype or percentiles (default: found)"),
        option("--weights", "FILE", "weights to start from, or DEFAULT to download (default: random)"),
        flag("--cache-features", "compute the map of each image once, with a frozen trunk, and keep it", default=None),
        MEMORY_BUDGET,
        option("--tile-size", "N", "pixels per step: N or [HEIGHT, WIDTH] (default: chosen)"),
        option("--epochs", "N", "passes over the training images (default: 20)", read_passes),
        option("--batch-size", "N", "images per optimizer step (default: 1)", int),
        option("--lr", "X", "learning rate of AdamW (default: 0.0001)", float),
        option("--seed", "N", "of weights, split, order and crops (default: 0)", int),
        option(
            "--split-images",
            "K",
            "let K processes share each image, see below; without a number, all",
            read_sharing,
            nargs="?",
            const=True,
        ),
        option("--config", "FILE", "configuration to start from", Path, action="append", default=[]),
        IMPORTS,
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
)

PRETRAIN = Verb(
    "train a model on images without labels, by a self-supervised method",
    "widefield.cli.call:run",
    (
        option("--out", "DIR", "folder of the run, new or empty", Path),
        _DATA,
        option("--method", "NAME", "(default: simclr)"),
        option("--epochs", "N", "passes over the images (default: 100)", int),
        option("--batch-size", "N", "images of a step (default: 128)", int),
        option("--seed", "N", "of all that is drawn (default: 0)", int),
        option("--spacing", "UM", "micrometres per pixel of patches of slides", float, dest="slides.spacing"),
        flag("--resume", "continue the run in --out", dest="resume_interrupted"),
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
)

EXPORT = Verb(
    "write the trained model of a checkpoint of `pretrain` or `fit` to a file of its own",
    "widefield.cli.call:run",
    (
        option("--out", "FILE", "file that is written", Path),
        _PRETRAINED,
        option("--part", "PART", "model, wrapped_model, embedding_model or adapters (default: model)"),
        option("--format", "FORMAT", "(default: package_default, a state dict)"),
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
)

EMBED = Verb(
    "write the embeddings of images by a checkpoint of `pretrain`",
    "widefield.cli.call:run",
    (
        option("--out", "FILE", "file that is written; with --patches the folder of the files", Path),
        _DATA,
        _PRETRAINED,
        flag("--patches", "write the features of the patches of each slide to a file of its own, see below"),
        option("--format", "FORMAT", "(default: torch; with --patches hdf5)"),
        option("--batch-size", "N", "images at a time (default: 128)", int),
        option("--spacing", "UM", "micrometres per pixel of slides as a whole, with image_size=null", float),
        foreground("auto, of slides as a whole"),
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
)
