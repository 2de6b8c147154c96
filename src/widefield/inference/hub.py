"""Folders that hold a trained model whole, for a disk or the Hugging Face Hub: weights, configuration and a model card."""

import csv
import inspect
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import widefield
from widefield.components.checkpoints import read_weights
from widefield.errors import WrongArgumentError
from widefield.inference.model_card import write_card
from widefield.inference.models import ModelInfo, checkpoint_file, info_in, info_of, other_weights, set_info
from widefield.inference.names import HUB_CONFIG, HUB_PREFIX, HUB_WEIGHTS
from widefield.models import Classifier, MapRegressor, Segmenter, class_of, read_checkpoint
from widefield.pretraining.checkpoint import KEY as PRETRAINED
from widefield.pretraining.checkpoint import Checkpoint
from widefield.pretraining.wrapping import wrap
from widefield.writing import replacing_folder, write_safetensors

_FORMAT = 1
_KINDS = {"Classifier": Classifier, "Segmenter": Segmenter, "MapRegressor": MapRegressor}
_BACKBONE = "Backbone"
_MACHINE = ("weights", "tile_size", "memory_budget")
"""Arguments of models that belong to a machine, or load something."""


@dataclass(frozen=True)
class Saved:
    """A model as a folder holds it.

    Attributes:
        kind: "Classifier", "Segmenter", "MapRegressor", or "Backbone", which `widefield pretrain` trained.
        model: What makes the model anew, as plain data: hyperparameters, or of a backbone `name`, `args` and `channels`.
        state: Its weights.
        images: How its images are read: the fields of `ModelInfo`, or of a backbone what they went through in the training.
        training: What is known of its training, for the model card.
    """

    kind: str
    model: dict[str, Any]
    state: Mapping[str, Tensor]
    images: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)


def save_pretrained(model: nn.Module | str | Path, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a trained model to a folder of its own, whole or not at all, which `get_model` opens and the Hugging Face Hub takes.

    It gets `model.safetensors`, `config.json` with all that makes the model anew, and `README.md`, a model card: how images are
    opened (level, spacing, channels) and normalised, classes, metrics, memory and plan. There is no code in it.

    Args:
        model: The folder of a run of `widefield fit` (its best epoch) or `pretrain`, a checkpoint of them, or a `Classifier`,
            `Segmenter` or `MapRegressor`. Of `pretrain` it is the trained backbone, if the run was given it by name.
        folder: New, or with `overwrite` replaced.
        overwrite: Replace what is there.

    Returns:
        The folder.

    Raises:
        WrongArgumentError: The model cannot be made anew from plain data.
        FileExistsError: There is something at `folder`.
        FileNotFoundError: There is no such run or checkpoint.

    Examples:
        >>> model = widefield.models.Classifier("resnet10_w16", ["benign", "malignant"])
        >>> folder = save_pretrained(model, "mine")  # doctest: +SKIP
        >>> widefield.get_model(folder).class_names  # doctest: +SKIP
        ['benign', 'malignant']
    """
    folder = Path(folder)
    if folder.exists() and not overwrite and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists; name another folder, or give overwrite=True to replace it")
    saved = _saved(model)
    about = {"format": _FORMAT, "widefield": widefield.__version__, "library_name": "widefield"}
    text = json.dumps({**about, "kind": saved.kind, "model": saved.model, "images": saved.images}, indent=2)
    with replacing_folder(folder) as partial:
        (partial / HUB_CONFIG).write_text(text + "\n", encoding="utf-8")
        write_safetensors(saved.state, partial / HUB_WEIGHTS)
        write_card(partial, saved.kind, saved.model, saved.images, saved.training, load_pretrained(partial))
    return folder


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model of Widefield",
) -> str:
    """Upload a trained model to the Hugging Face Hub, as `save_pretrained` writes it; its repository is made if there is none.

    `get_model("hf-hub:OWNER/NAME")` opens it. Files of the same names in the repository are replaced, its model card too.

    Args:
        model: As for `save_pretrained`.
        repo_id: `OWNER/NAME`.
        private: Of a new repository: who may see it; None stands for what is usual for its owner.
        token: To write there; None: that of `hf auth login`.
        revision: A branch; None: the main one.
        commit_message: Its first line.

    Returns:
        The address of the commit.

    Raises:
        WrongArgumentError, FileNotFoundError: As of `save_pretrained`.
        OSError: It could not be uploaded.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="widefield-") as temporary:
        folder = save_pretrained(model, Path(temporary) / "model")
        try:
            api = HfApi(token=token, library_name="widefield", library_version=widefield.__version__)
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=commit_message
            )
        except Exception as error:  # of the hub, of the network, of either's client
            raise OSError(
                f"the model could not be uploaded to {repo_id!r} ({_reason(error)}); check OWNER/NAME, the network and your login "
                "(`hf auth login`), or write it with save_pretrained(model, FOLDER) and upload that where there is a network: "
                "`hf upload OWNER/NAME FOLDER`"
            ) from error
    return commit.commit_url


def fetch(name: str) -> Path:
    """Return the folder of the hub's cache for a model that is named `hf-hub:OWNER/NAME`, maybe with `@REVISION`.

    Raises:
        OSError: It cannot be fetched, or is no model of Widefield.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    try:
        # These files alone: whatever else is in the repository is not fetched.
        found = snapshot_download(repo, revision=revision or None, allow_patterns=[HUB_CONFIG, HUB_WEIGHTS])
    except Exception as error:
        raise OSError(
            f"{name} cannot be fetched ({_reason(error)}); check OWNER/NAME[@REVISION] and the network, and log in if the model is "
            "private (`hf auth login`), or download it elsewhere (`hf download OWNER/NAME --local-dir FOLDER`) and give the folder"
        ) from error
    return Path(found)


def load_pretrained(folder: Path, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a folder that `save_pretrained` wrote; nothing in it is executed.

    Args:
        folder: With `config.json` and `model.safetensors`.
        options: `tile_size` and `memory_budget` of a model by name.

    Raises:
        FileNotFoundError: One of the two files is not there.
        WrongArgumentError: They are damaged, of another library, or do not belong together.
    """
    config = _read_config(folder / HUB_CONFIG)
    weights = folder / HUB_WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{folder} holds no {HUB_WEIGHTS}; download the folder again, or write it anew")
    options = dict(options or {})
    try:
        model = _made(config, options)
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongArgumentError(
            f"{folder / HUB_CONFIG} does not describe a {config['kind']} ({error!s:.200}); write the folder anew with "
            "widefield.save_pretrained"
        ) from error
    try:
        model.load_state_dict(read_weights(weights))
    except RuntimeError as error:
        raise other_weights(error, weights) from error
    return model


def _made(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    given, images = config["model"], config["images"]
    if config["kind"] == _BACKBONE:
        if options:
            raise WrongArgumentError(
                f"{', '.join(options)}: a backbone is made as it is; stream it with widefield.stream"
            )
        _refuse_code(given["args"], HUB_CONFIG)
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, though they go
            made: nn.Module = wrap(given["name"], given["args"], given["channels"]).get_model()
        return made
    kind = _KINDS[config["kind"]]
    known = inspect.signature(kind).parameters.keys() - {*_MACHINE}
    if foreign := sorted(given.keys() - known):
        raise TypeError(f"it has no argument {foreign[0]!r}")
    model = kind(**given, **options)
    pixels = images.get("pixels")
    set_info(
        model,
        ModelInfo(
            tuple(images["class_names"]) if images["class_names"] else None,
            images["opening"],
            pixels=None if pixels is None else (int(pixels[0]), str(pixels[1])),
            foreground=str(images["foreground"]),
        ),
    )
    return model


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder that widefield.save_pretrained wrote")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WrongArgumentError(
            f"{path} is no JSON ({error}); it is damaged: download it again, or write the folder anew"
        ) from error
    parts = ("format", "kind", "model", "images")
    if not isinstance(config, dict) or not all(part in config for part in parts):
        raise WrongArgumentError(
            f"{path} is of another library, as it lacks some of {', '.join(parts)}; give a folder that widefield.save_pretrained "
            "wrote, or open the model by its own library (timm/hf-hub:OWNER/NAME is one of timm)"
        )
    if config["format"] != _FORMAT or config["kind"] not in (*_KINDS, _BACKBONE):
        raise WrongArgumentError(
            f"{path} has format {config['format']!r} and kind {config['kind']!r}, and this version of Widefield reads format "
            f"{_FORMAT} and the kinds {', '.join((*_KINDS, _BACKBONE))}; install a newer Widefield"
        )
    return config


def _saved(model: nn.Module | str | Path) -> Saved:
    if isinstance(model, nn.Module):
        if not isinstance(model, (Classifier, Segmenter, MapRegressor)):
            raise WrongArgumentError(
                f"a {type(model).__name__} is not made by a name, so that no folder could make it anew without code; give a "
                "Classifier, Segmenter or MapRegressor, or the run or checkpoint of `widefield fit` or `pretrain`. Models of timm "
                "have timm.models.save_for_hf, and any module has huggingface_hub.PyTorchModelHubMixin"
            )
        return _by_name(model.hparams, model.state_dict(), info_of(model), {})
    path = checkpoint_file(Path(model))
    checkpoint = read_checkpoint(path)
    if PRETRAINED in checkpoint:
        return _backbone(Checkpoint.read(path))
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    if "model_name" not in hyper_parameters:
        raise WrongArgumentError(
            f"{path} is of a model that its configuration makes, which may name any function that can be imported; such a folder "
            "could run code of strangers. Publish the run's config.yaml and its checkpoint, which widefield.get_model opens "
            "together, or train a network by name (--model NAME)"
        )
    return _by_name(hyper_parameters, checkpoint["state_dict"], info_in(checkpoint), _training_of(path, checkpoint))


def _by_name(
    hyper_parameters: Mapping[str, Any], state: Mapping[str, Tensor], info: ModelInfo, training: dict[str, Any]
) -> Saved:
    plain = {name: value for name, value in hyper_parameters.items() if name not in _MACHINE}
    images = {
        "class_names": list(info.class_names or hyper_parameters["class_names"]),
        "opening": dict(info.opening),
        "pixels": info.pixels,
        "foreground": info.foreground,
    }
    return Saved(class_of(plain).__name__, plain, state, images, training)


def _backbone(found: Checkpoint) -> Saved:
    named = found.about["named_model"]
    if named is None:
        raise WrongArgumentError(
            f"{found.path} holds weights and no code, and the run was not given its model by name, so that no folder could make it "
            "anew; `widefield export --format safetensors` writes its weights"
        )
    _refuse_code(named["args"], found.path)
    kept = found.about["transforms"]
    images = {name: kept[name] for name in ("num_channels", "value_range", "normalize")}
    training = {"method": found.about["method"], "epochs": found.epoch + 1, "steps": found.step}
    model = {**named, "channels": found.transforms.channels}
    return Saved(_BACKBONE, model, found.weights("model"), images, training)


def _refuse_code(value: Any, place: Any) -> None:
    """Raises WrongArgumentError if plain data name a class by where it is imported from, as `{type: package.Class}` does."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key in ("type", "class_path") and not re.fullmatch(r"\w+", str(part)):
                raise WrongArgumentError(
                    f"{place}: {key}: {part!r} is imported from elsewhere; such a folder may name components of Widefield alone"
                )
            _refuse_code(part, place)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _refuse_code(part, place)


def _training_of(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the epoch of a checkpoint, its row of `history.csv`, and `memory.json`, as far as they lie beside it."""
    training: dict[str, Any] = {"epochs": checkpoint["epoch"] + 1}
    history, memory = path.parent / "history.csv", path.parent / "memory.json"
    if history.is_file():
        with history.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("epoch") == str(training["epochs"])]
        training["metrics"] = {name: value for name, value in (rows or [{}])[-1].items() if name != "epoch"}
    if memory.is_file():
        training["memory"] = json.loads(memory.read_text(encoding="utf-8"))
    return training


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
