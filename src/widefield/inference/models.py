"""A model by its name, its configuration, or the run that trained it, and the data that belong to it beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from widefield.components.checkpoints import class_names_in, locate, read_torch_file, read_weights
from widefield.components.initializers import Pretrained
from widefield.components.models.base_model import BaseModel
from widefield.config import Config, build, load, merge, ready_configs
from widefield.data import Pipeline
from widefield.images import ForegroundChoice, ImageFile, open_image
from widefield.inference.names import BEST, CONFIG, HUB_CONFIG, HUB_PREFIX, HUB_WEIGHTS, LAST, model_names
from widefield.models import class_of, pixels_in, read_checkpoint
from widefield.models.networks import NARROW_RESNETS, TIMM_PREFIX, make_resnet, make_timm, make_torchvision
from widefield.modules import DenseModule
from widefield.pretraining.checkpoint import KEY as PRETRAINED
from widefield.registry import MODELS, import_module_or_file, split_description, suggestion


@dataclass(frozen=True)
class ModelInfo:
    """Class names of a model, and how its images are read.

    Attributes:
        class_names: Names of the classes; None where they have none.
        opening: How the images of the training were opened: level, spacing, channels, alpha and fill of `open_image`.
        pipeline: What images went through in validation.
        pixels: Number of channels and type of the pixels of the training images; None if that is not known.
        foreground: How the foreground of the training images was found, see `ForegroundChoice.method`.
    """

    class_names: tuple[str, ...] | None = None
    opening: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Pipeline = field(default_factory=Pipeline)
    pixels: tuple[int, str] | None = None
    foreground: str = "none"

    def open(self, path: str | Path, **other: Any) -> ImageFile:
        """Open an image as those of the training were, but for what is given otherwise, with its background.

        Where transforms change the image before the model sees it, it has none.

        Raises:
            OSError, ValueError: As of `open_image` and `ForegroundChoice.of`; its channels or type are not those of the training.
        """
        given = {name: value for name, value in other.items() if value is not None}
        if given.keys() & {"level", "spacing"}:
            given = {"level": None, "spacing": None} | given
        image = open_image(path, **{**self.opening, **given})
        found = image.shape[0], str(image.dtype)
        if self.pixels is not None and found != self.pixels:
            raise ValueError(
                f"{path} has {found[0]} channel(s) of {found[1]}, and the model was trained on {self.pixels[0]} of "
                f"{self.pixels[1]}, whose values mean something else; convert the image"
            )
        if not self.pipeline.description:
            image.background = ForegroundChoice(self.foreground).of(image)
        return image

    def with_foreground(self, method: str | None, images: int = 1) -> "ModelInfo":
        """Return the same info with another way to find the foreground of so many images; None keeps that of the training.

        Raises:
            ValueError: There is no such method, or transforms change the images before the model sees them.
        """
        choice = ForegroundChoice(self.foreground if method is None else str(method))
        choice.check_count(images)
        if method is not None and choice.is_explicit and self.pipeline.description:
            raise ValueError(
                f"foreground={choice.method!r}: the transforms of the run change images before the model sees them, so that it "
                "takes no mask; leave it out"
            )
        return replace(self, foreground=choice.method)

    def names(self, count: int) -> tuple[str, ...]:
        """Names of so many scores: those of the classes, and numbers where there are no names."""
        known = self.class_names or ()
        return (*known[:count], *(str(index) for index in range(len(known), count)))


def info_of(model: nn.Module) -> ModelInfo:
    """Return the info that `get_model` attached to `model`, or else what the model itself has."""
    found = model.__dict__.get("_info")
    if isinstance(found, ModelInfo):
        return found
    names = getattr(model, "class_names", None)
    return ModelInfo(None if names is None else tuple(names))


def set_info(model: nn.Module, info: ModelInfo) -> None:
    """Keep `info` with the model."""
    model.__dict__["_info"] = info


Name = str | Path | Config | Mapping[str, Any]
_TORCHVISION_PREFIX = "torchvision/"
_MESSAGE = 300
"""Characters of an error that lists all weights."""
_CONFIG_ENDINGS = (".yaml", ".yml", ".json", ".py")


def get_model(
    name: Name, pretrained: bool | str | Path = False, device: str | torch.device | None = None, **overrides: Any
) -> Any:
    """A model in evaluation mode.

    Args:
        name: A ready configuration, a name that `list_models` gives, a class of `MODELS`, the description of a model
            (`{type: ImageClassifier, ...}`), a configuration or its file, a checkpoint that `widefield fit` wrote, or the folder of
            its run; a folder that `save_pretrained` wrote, or `hf-hub:OWNER/NAME[@REVISION]` for one on the Hugging Face Hub.
        pretrained: A file of weights; True takes those that torchvision or timm publish, which may download them; False makes
            random ones. A checkpoint or a run has its weights anyway.
        device: Where the model goes.
        overrides: Laid over the description of the model: `backbone={"out_indices": (0, 1, 2, 3)}` changes this argument alone.

    Returns:
        A model of components or a `Classifier`; of torchvision's and timm's names the plain network, of 1000 classes.

    Raises:
        ValueError: An unknown name, arguments that the model does not take, or weights that there are not.
        FileNotFoundError: There is no such file.
        OSError: A model cannot be fetched.

    Examples:
        >>> wf.get_model("torchvision/resnet18").fc.out_features
        1000
    """
    model = _made(name, pretrained, overrides)
    return model.eval() if device is None else model.eval().to(device)


def as_model(model: nn.Module | Name, pretrained: bool | str | Path, device: str | torch.device | None) -> Any:
    """A model in evaluation mode, itself or by what `get_model` takes."""
    if not isinstance(model, nn.Module):
        return get_model(model, pretrained, device)
    return model.eval() if device is None else model.eval().to(device)


def _made(name: Name, pretrained: bool | str | Path, overrides: dict[str, Any]) -> nn.Module:
    if isinstance(name, Config):
        return _from_config(name, pretrained, overrides)
    if isinstance(name, Mapping):
        return _from_config(Config({"model": dict(name)}), pretrained, overrides)
    path = Path(name)
    if str(name).startswith(HUB_PREFIX):
        from widefield.inference.hub import fetch

        path = fetch(str(name))
    if path.is_dir() or path.suffix == ".ckpt":
        if not isinstance(pretrained, bool):
            raise ValueError(f"{name} has weights of its own; leave pretrained={str(pretrained)!r} out")
        return load_trained(path, overrides)
    if name in ready_configs() or path.suffix in _CONFIG_ENDINGS:
        return _from_config(load(path), pretrained, overrides)
    if str(name) in MODELS:
        return _from_config(Config({"model": {"type": str(name)}}), pretrained, overrides)
    return _plain(str(name), pretrained, overrides)


def load_trained(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    streaming: Mapping[str, Any] | None = None,
    config: Config | None = None,
) -> nn.Module:
    """The model of a checkpoint, or of the folder of a run: that of its best epoch.

    Args:
        path: The checkpoint or the folder.
        overrides: Laid over the description of the model.
        streaming: `tile_size` and `memory_budget`, which belong to the machine and are not in the checkpoint.
        config: Of the run; None reads the file beside the checkpoint.
    """
    path = checkpoint_file(path)
    if path.name == HUB_WEIGHTS and (path.parent / HUB_CONFIG).is_file():
        from widefield.inference.hub import load_pretrained

        return load_pretrained(path.parent, {**(streaming or {}), **(overrides or {})})
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; name a .ckpt file, the folder of a run of `widefield fit`, or one that save_pretrained wrote"
        )
    checkpoint = read_checkpoint(path)
    if "model_name" in checkpoint.get("hyper_parameters", {}):
        classifier, _ = class_of(checkpoint["hyper_parameters"]).from_checkpoint(
            path, **(streaming or {}), **(overrides or {})
        )
        set_info(classifier, info_in(checkpoint))
        return classifier
    if PRETRAINED in checkpoint:
        raise ValueError(
            f"{path} is of `widefield pretrain`, and its model has no classifier; `widefield fit --weights` trains one on what "
            "`widefield export` writes of it, and widefield.load_model_from_checkpoint opens it as it is"
        )
    if config is None:
        beside = path.parent / CONFIG
        if not beside.is_file():
            raise FileNotFoundError(
                f"{beside} does not exist, and {path} does not say what its model is; put the configuration there "
                "(`widefield config convert` makes one of MMPretrain's), or name it, to predict with --config FILE"
            )
        config = load(beside)
    if streaming:
        described = _changed(config, {}).data.get("model") or {}  # which imports the user's components
        inside = "backbone" in described and not _is_streamed_whole(described)
        config = _changed(config, {"backbone": {"streaming": dict(streaming)}} if inside else streaming)
    model = build(_changed(config, overrides or {}), ("model",))
    load_all(model, path)
    info = info_in(checkpoint, config.data.get("data"))
    set_info(model, info)
    if isinstance(model, DenseModule) and len(info.class_names or ()) == len(model.class_names):
        model.class_names = list(info.class_names or ())
    return model  # type: ignore[no-any-return]


def _is_streamed_whole(description: Mapping[str, Any]) -> bool:
    """Return True if a model is streamed with its backbone, which does not stream by itself."""
    kind, _ = split_description(description)
    found = MODELS.get(kind) if isinstance(kind, str) else kind
    return isinstance(found, type) and issubclass(found, DenseModule)


def load_all(model: nn.Module, path: Path) -> None:
    """Load all weights of a model from a checkpoint of this library or of MMPretrain.

    Raises:
        ValueError: They are of another model.
    """
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise other_weights(error, path) from error


def checkpoint_file(path: Path) -> Path:
    """Return `path`, or the weights in a folder: of a run of `fit` those of its best epoch, of one of `pretrain` the last."""
    if not path.is_dir():
        return path
    names = (BEST, LAST, HUB_WEIGHTS, f"checkpoints/{LAST}")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None and (path / HUB_CONFIG).is_file():
        return path / HUB_WEIGHTS
    return found or path / BEST


def other_weights(error: Exception, checkpoint: Path) -> ValueError:
    """The error to raise for one of `load_state_dict`: the first difference between the model and the checkpoint."""
    lines = [line.strip() for line in str(error).splitlines()]
    return ValueError(f"{checkpoint} is no checkpoint of this model: {shorten(' '.join(lines[:2]), _MESSAGE)}")


def class_names_of(checkpoint: Path) -> tuple[str, ...] | None:
    """Names of the classes of a checkpoint that `fit` or MMPretrain wrote; None where they have none."""
    return info_in(read_checkpoint(checkpoint)).class_names


def _from_config(config: Config, pretrained: bool | str | Path, overrides: dict[str, Any]) -> nn.Module:
    config = _changed(config, overrides)
    if "model" not in config.data:
        raise ValueError("the configuration has no model; give one with a section model: {type: ImageClassifier, ...}")
    model = build(config, ("model",))
    if pretrained is True and not any(getattr(part, "is_pretrained", False) for part in model.modules()):
        raise ValueError(
            "there are no published weights for this configuration; give a file, as in pretrained='best.ckpt'"
        )
    if isinstance(model, BaseModel):
        model.init_weights()
    if not isinstance(pretrained, bool):
        Pretrained(checkpoint=str(pretrained))(model)
    began_with = config.data["model"].get("pretrained") if isinstance(pretrained, bool) else pretrained
    info = info_in({}, config.data.get("data"))
    set_info(model, replace(info, class_names=_names_beside(began_with, model)))
    return model  # type: ignore[no-any-return]


def _names_beside(weights: str | Path | None, model: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the classes beside weights, None where they are not as many as the classes of the model's head."""
    path = Path("" if weights is None else locate(weights))
    if not path.is_file() or path.suffix == ".safetensors":
        return None
    content = read_torch_file(path, "meta")
    names = info_in(content).class_names if isinstance(content, dict) else None
    return names if names and len(names) == getattr(getattr(model, "head", None), "num_classes", None) else None


def _changed(config: Config, overrides: Mapping[str, Any]) -> Config:
    for place in config.data.get("imports") or ():
        import_module_or_file(place)
    return merge(config, Config({"model": dict(overrides)})) if overrides else config


def info_in(checkpoint: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> ModelInfo:
    """From the state of the data module in the checkpoint, and from the section of the configuration that describes it."""
    data = data or {}
    parts = [part for key, part in checkpoint.items() if key != "hyper_parameters" and isinstance(part, dict)]
    state = next((part for part in parts if "class_names" in part), {})
    names = state.get("class_names") or checkpoint.get("hyper_parameters", {}).get("class_names")
    names = names or class_names_in(checkpoint)
    seen = data.get("test") or data.get("val") or {}
    return ModelInfo(
        None if names is None else tuple(names),
        {
            name: one[name]
            for name in ("level", "spacing", "channels", "alpha", "fill")
            for one in (data, seen, state)
            if name in one
        },
        Pipeline(seen.get("transforms")),
        pixels_in(checkpoint),
        state.get("foreground", data.get("foreground", "none")),
    )


def _plain(name: str, pretrained: bool | str | Path, options: dict[str, Any]) -> nn.Module:
    """A network of torchvision or timm, or a narrow ResNet."""
    weights = "DEFAULT" if pretrained is True else None if pretrained is False else str(pretrained)
    classes = options.pop("num_classes", 1000)
    if name.startswith(TIMM_PREFIX):
        return make_timm(name, classes, weights, **options)
    if name in NARROW_RESNETS and not options:
        return make_resnet(name, classes, weights)
    if name in model_names() and name.startswith(_TORCHVISION_PREFIX):
        return make_torchvision(name.removeprefix(_TORCHVISION_PREFIX), classes, weights, **options)
    raise ValueError(
        f"there is no model {name!r}; {suggestion(name, [*ready_configs(), *MODELS.names('model'), *model_names()])}"
    )
