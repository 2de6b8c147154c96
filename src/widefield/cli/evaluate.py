"""`widefield validate` and `widefield test`: the metrics of a trained model."""

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from widefield.cli.configuration import read_run
from widefield.cli.configured import ConfiguredCLI, ignore_irrelevant_warnings
from widefield.config import Config
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.models import class_names_of, load_all, other_weights
from widefield.models import read_checkpoint
from widefield.writing import replacing

_log = logging.getLogger(__name__)
Numbers = dict[str, Any]
"""Numbers, or nested lists of them, by name."""


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Test or validate, as `arguments.verb` says, and show the numbers."""
    views = None if arguments.tta is None else AveragedViews.parse(arguments.tta)
    config, checkpoint = read_run(arguments, others)
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"the folder of {arguments.out} does not exist; make it, or name another file with --out"
        )
    numbers = evaluate(config, checkpoint, arguments.verb, views)
    width = max(map(len, numbers), default=0)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {_text(value)}")
    if arguments.out is not None:
        with replacing(arguments.out) as partial:
            partial.write_text(json.dumps(numbers, indent=2), encoding="utf-8")


def evaluate(
    config: Config, checkpoint: Path, phase: str, views: AveragedViews | None = None, more: Sequence[Metric] = ()
) -> Numbers:
    """The loss and the metrics of the model in `checkpoint`.

    Args:
        config: A checked configuration.
        checkpoint: A file that `fit` wrote, or one of MMPretrain.
        phase: "validate", or "test", which takes the validation images where there are no test images.
        views: Test-time augmentation of the metrics.
        more: Metrics beside those of the configuration.

    Raises:
        ValueError: There are no images, or the checkpoint is of another model.
    """
    of_lightning = "pytorch-lightning_version" in read_checkpoint(checkpoint)
    # where training began; a `Classifier` would load them once more
    (config.data.get("model") or {}).pop("weights", None)
    with warnings.catch_warnings():
        ignore_irrelevant_warnings()
        cli = ConfiguredCLI(config, [], f"widefield {phase}", views, more)
        data = cli.datamodule
        cli.keep_features()
        counts = {name: len(getattr(data, f"{name}_set", (None,))) for name in ("val", "test")}
        if phase == "test" and not counts["test"] and counts["val"]:
            _log.info("there are no test images; these are the validation images")
            data.test_set = data.val_set
        elif not counts["val" if phase == "validate" else "test"]:
            raise ValueError(
                f"there are no images to {phase} with; give some rows of data.labels the split val or test, or describe data.val "
                "or data.test"
            )
        if not of_lightning:
            load_all(cli.model, checkpoint)
            names, own = class_names_of(checkpoint), getattr(data, "class_names", None)
            if names and own and set(names) == set(own) and list(names) != list(own):
                data.load_state_dict({"class_names": list(names)})  # refuses another order
        step = cli.trainer.validate if phase == "validate" else cli.trainer.test
        try:
            step(
                cli.model,
                datamodule=data,
                ckpt_path=checkpoint if of_lightning else None,
                weights_only=True,
                verbose=False,
            )
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            raise other_weights(error, checkpoint) from error
    found: dict[str, Tensor] = dict(cli.trainer.callback_metrics)
    prefix = "val_" if phase == "validate" else "test_"
    found |= {prefix + name: value for name, value in cli.evaluation.results.items()}
    found |= getattr(cli.model, "tables", {})
    return {name: value.tolist() for name, value in sorted(found.items())}


def _text(value: Any) -> str:
    """A number; of a matrix, a line for each row."""
    if isinstance(value, list):
        between = "\n  " if value and isinstance(value[0], list) else " "
        return between + between.join(_text(one) for one in value)
    return f"{value:.6g}"
