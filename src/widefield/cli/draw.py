"""The pictures of `widefield visualize`."""

import argparse
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.cli.configuration import read_run
from widefield.cli.configured import ConfiguredCLI, ignore_irrelevant_warnings
from widefield.cli.evaluate import evaluate
from widefield.cli.fit_sections import SECTIONS
from widefield.cli.predict import ENDINGS, explain, for_each, free_stem, image_files
from widefield.components.metrics.classification_metrics import ConfusionMatrix
from widefield.config import load, override
from widefield.errors import MissingExtraError
from widefield.inference.features import features_of
from widefield.inference.models import class_names_of, info_of, load_trained
from widefield.registry import import_module_or_file
from widefield.reports import save_overlay
from widefield.reports.figures import learning_rates, save_confusion_matrix, save_points, save_schedule, tsne

_log = logging.getLogger(__name__)


def draw_cam(arguments: argparse.Namespace, others: list[str]) -> None:
    """An overlay for each image: the evidence for a class at a layer."""
    model: Any = load_trained(arguments.checkpoint)
    info = info_of(model)
    label = _index(arguments.label, info.class_names)
    files = image_files(arguments.images)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def draw_one(file: Path) -> None:
        image = info.open(file)
        picture = info.pipeline(image)
        found = explain(model, picture, arguments.layer, label)
        if found is None:
            raise ValueError(
                f"a {type(model).__name__} has no last map; name a layer with --layer, as in backbone.layer3"
            )
        scores, heatmap = found
        index = int(scores.argmax()) if label is None else label
        name = info.names(index + 1)[index]
        title = f"{image.path.name}: {name} ({float(scores[index]):.0%}){' at ' + arguments.layer if arguments.layer else ''}"
        path = arguments.out / (free_stem(file, drawn) + ENDINGS["png"])
        save_overlay(path, picture, heatmap, title)
        drawn.add(path.name)

    drawn: set[str] = set()
    for_each(files, draw_one)
    _log.info("%d pictures: %s", len(files), arguments.out)


def draw_tsne(arguments: argparse.Namespace, others: list[str]) -> None:
    """Points for the features of labelled images."""
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtraError("t-SNE", "scikit-learn", "tsne")
    config, checkpoint = read_run(arguments, others)
    model: Any = load_trained(checkpoint, config=config)
    with warnings.catch_warnings():
        ignore_irrelevant_warnings()
        data = ConfiguredCLI(config, [], "widefield visualize").datamodule
    task = getattr(data, "target", {}).get("task", "classification")
    if task != "classification":
        raise ValueError(f"points have the colour of the class of an image, and data.task={task} has no classes")
    if not len(getattr(data, f"{arguments.split}_set", (None,))):
        raise ValueError(f"there are no {arguments.split} images; choose others with --split")
    loader = getattr(data, f"{arguments.split}_dataloader")()
    vectors, labels = [], []
    for picture, label in _labelled(loader):
        vectors.append(_vector(features_of(model, picture, arguments.stage)))
        labels.append(label)
        if len(labels) == arguments.count:
            break
    save_points(arguments.out, tsne(np.stack(vectors), arguments.perplexity), labels, class_names_of(checkpoint))
    _log.info("%d images: %s", len(labels), arguments.out)


def draw_schedule(arguments: argparse.Namespace, others: list[str]) -> None:
    """The learning rate of every epoch."""
    config = load(*arguments.config)
    for place in config.data.get("imports") or ():
        import_module_or_file(place)
    data = override(config, others, SECTIONS).data
    if data.get("optimizer") is None:
        raise ValueError(
            "the configuration has no optimizer, so its rate is model.lr throughout; describe one, as in optimizer.type=SGD"
        )
    epochs = (data.get("trainer") or {}).get("max_epochs", 20)
    if epochs is None or epochs < 1:
        raise ValueError(f"trainer.max_epochs={epochs}; give how many epochs are drawn, as in trainer.max_epochs=20")
    rates = learning_rates(data["optimizer"], data.get("lr_scheduler"), epochs, arguments.steps_per_epoch)
    save_schedule(arguments.out, rates)
    _log.info("%d epochs: %s", epochs, arguments.out)


def draw_confusion(arguments: argparse.Namespace, others: list[str]) -> None:
    """Draw the confusion matrix."""
    config, checkpoint = read_run(arguments, others)
    numbers = evaluate(config, checkpoint, "test", more=[ConfusionMatrix()])
    matrix = np.array(numbers["test_confusion_matrix/result"])
    names = class_names_of(checkpoint)
    save_confusion_matrix(arguments.out, matrix, names if names is not None and len(names) == len(matrix) else None)
    _log.info("%d images: %s", matrix.sum(), arguments.out)


def _index(text: str | None, class_names: tuple[str, ...] | None) -> int | None:
    if text is None:
        return None
    if class_names and text in class_names:
        return class_names.index(text)
    if not text.isdecimal():
        raise ValueError(
            f"there is no class {text!r}; the classes are {', '.join(class_names or ()) or 'without names'}"
        )
    return int(text)


def _labelled(loader: Any) -> Iterator[tuple[Any, int]]:
    """Pictures one by one with their first class."""
    for inputs, targets in loader:
        for picture, target in zip(inputs, targets, strict=True):
            yield picture, int(target if isinstance(target, Tensor) else target.gt_label[0])


def _vector(features: Any) -> np.ndarray:
    """The last features of an image, the mean over the positions of a map."""
    last: Tensor = features[-1] if isinstance(features, tuple) else features
    return (last.flatten(1).mean(1) if last.ndim == 3 else last.flatten()).float().cpu().numpy()
