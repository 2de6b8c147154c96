"""Files of weights and where they are: read so that they can execute nothing, fetched by their addresses and names."""

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from widefield.errors import WrongArgumentError
from widefield.registry import suggestion

_OPENMMLAB = "https://download.openmmlab.com/"
_THIRD_PARTY = f"{_OPENMMLAB}pretrain/third_party/"
_MMCLS = f"{_OPENMMLAB}mmclassification/v0/"
ADDRESSES = {
    "open-mmlab": {
        "contrib/mobilenet_v3_large": f"{_THIRD_PARTY}mobilenet_v3_large-bc2c3fd3.pth",
        "contrib/mobilenet_v3_small": f"{_THIRD_PARTY}mobilenet_v3_small-47085aa1.pth",
        "contrib/resnet50_gn": f"{_THIRD_PARTY}resnet50_gn_thangvubk-ad1730dd.pth",
        "detectron/resnet101_caffe": f"{_THIRD_PARTY}resnet101_caffe-3ad79236.pth",
        "detectron/resnet101_gn": f"{_THIRD_PARTY}resnet101_gn-cac0ab98.pth",
        "detectron/resnet50_caffe": f"{_THIRD_PARTY}resnet50_caffe-788b5fa3.pth",
        "detectron/resnet50_gn": f"{_THIRD_PARTY}resnet50_gn-9186a21c.pth",
        "detectron2/resnet101_caffe": f"{_THIRD_PARTY}resnet101_msra-6cc46731.pth",
        "detectron2/resnet50_caffe": f"{_THIRD_PARTY}resnet50_msra-5891d200.pth",
        "mmdet/mobilenet_v2": f"{_OPENMMLAB}mmdetection/v2.0/third_party/mobilenet_v2_batch256_imagenet-ff34753d.pth",
        "resnet101_v1c": f"{_THIRD_PARTY}resnet101_v1c-e67eebb6.pth",
        "resnet18_v1c": f"{_THIRD_PARTY}resnet18_v1c-b5776b93.pth",
        "resnet50_v1c": f"{_THIRD_PARTY}resnet50_v1c-2cccc1ad.pth",
    },
    "mmcls": {
        "mobilenet_v2": f"{_MMCLS}mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth",
        "mobilenet_v3_large": f"{_MMCLS}mobilenet_v3/convert/mobilenet_v3_large-3ea3c186.pth",
        "mobilenet_v3_small": f"{_MMCLS}mobilenet_v3/convert/mobilenet_v3_small-8427ecf0.pth",
        "resnet101": f"{_MMCLS}resnet/resnet101_8xb32_in1k_20210831-539c63f8.pth",
        "resnet101_v1d": f"{_MMCLS}resnet/resnetv1d101_b32x8_imagenet_20210531-6e13bcd3.pth",
        "resnet152": f"{_MMCLS}resnet/resnet152_8xb32_in1k_20210901-4d7582fa.pth",
        "resnet152_v1d": f"{_MMCLS}resnet/resnetv1d152_b32x8_imagenet_20210531-278cf22a.pth",
        "resnet18": f"{_MMCLS}resnet/resnet18_8xb32_in1k_20210831-fbbb1da6.pth",
        "resnet34": f"{_MMCLS}resnet/resnet34_8xb32_in1k_20210831-f257d4e6.pth",
        "resnet50": f"{_MMCLS}resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth",
        "resnet50_v1d": f"{_MMCLS}resnet/resnetv1d50_b32x8_imagenet_20210531-db14775a.pth",
    },
}
"""Addresses of MMEngine's names, `open-mmlab://NAME` and `mmcls://NAME`, of the networks that are here."""
_SCHEMES = {"openmmlab": "open-mmlab", "modelzoo": "torchvision"}
_TIMM = "timm/"


def read_weights(source: str | Path, map_location: str = "cpu") -> dict[str, Tensor]:
    """Return the weights, by name, of a file or of what `source` names.

    Of a checkpoint it is the part `state_dict` or `model`; `module.`, which parallel training writes before names, is left out.

    Args:
        source: A file (.safetensors, or what `torch.save` wrote), an address (`https://...`), `torchvision://resnet50` (or another
            of its weights: `torchvision://resnet50.imagenet1k_v2`, `torchvision://ResNet50_Weights.IMAGENET1K_V2`),
            `timm/resnet50.a1_in1k`, `open-mmlab://NAME` or `mmcls://NAME`.
        map_location: Where tensors are read to.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be fetched.
        WrongArgumentError: It holds no weights, or the name is unknown.
    """
    where = locate(source)
    if where.startswith(_TIMM):
        return _fetch_timm(where.removeprefix(_TIMM))
    path = _fetch(where) if "://" in where else Path(where)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path, device=map_location)
        except SafetensorError as error:
            raise WrongArgumentError(
                f"{path} cannot be read as safetensors ({error}); it is another file, or truncated"
            ) from error
    content = read_torch_file(path, map_location)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    found = {} if not isinstance(content, dict) else content
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        kind = (
            f"a {type(content).__name__}" if not isinstance(content, dict) else ", ".join(map(str, list(content)[:3]))
        )
        raise WrongArgumentError(
            f"{path} holds no state dict but {kind or 'nothing'}; where the model can be made, save `model.state_dict()` with "
            "torch.save or safetensors"
        )
    return {key.removeprefix("module."): value for key, value in found.items()}


def class_names_in(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the names of the classes that the content of a checkpoint of MMPretrain holds; None where it holds none.

    They are `meta['dataset_meta']['classes']`, and before 1.0 `meta['CLASSES']`.
    """
    meta = content.get("meta")
    if not isinstance(meta, dict):
        return None
    data = meta.get("dataset_meta")
    names = data.get("classes") if isinstance(data, dict) else meta.get("CLASSES")
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def locate(source: str | Path) -> str:
    """Return the file, the address, or the name `timm/NAME` that `source` stands for, see `read_weights`; nothing is fetched.

    Raises:
        FileNotFoundError: There is no such file.
        WrongArgumentError: There is no such name, or it is of a kind that is unknown here.
    """
    text = str(source)
    scheme, separator, name = text.partition("://")
    if not separator:
        if Path(text).is_file():
            return text
        if text.startswith(_TIMM):
            import timm  # seconds to import, and few need it

            short = text.removeprefix(_TIMM)
            if not timm.is_model(short):
                raise WrongArgumentError(
                    f"timm has no network named {short!r}; {suggestion(short, timm.list_models())}"
                )
            return text
        raise FileNotFoundError(f"{text} does not exist" if text else "checkpoint is '', where a file is to be named")
    scheme = _SCHEMES.get(scheme, scheme)
    if scheme == "torchvision":
        return _torchvision_address(name)
    if scheme in ADDRESSES:
        if name not in ADDRESSES[scheme]:
            raise WrongArgumentError(
                f"{text}: no address is known here for the name {name!r}, so give the address that MMEngine has for it in its "
                f"folder hub, or the file; {suggestion(name, ADDRESSES[scheme])}"
            )
        return ADDRESSES[scheme][name]
    if scheme in ("http", "https", "file"):
        return text
    raise WrongArgumentError(
        f"{text}: {scheme}:// cannot be read; give the file itself, or an address that begins with https://"
    )


def _torchvision_address(name: str) -> str:
    """Return the address of `resnet50` (the first weights that were published), `resnet50.imagenet1k_v2` or an enum member."""
    from torchvision import models

    network, _, version = name.lower().replace("_weights.", ".").partition(".")
    if network not in models.list_models():
        raise WrongArgumentError(
            f"torchvision has no network named {network!r}; {suggestion(network, models.list_models())}"
        )
    known: Any = models.get_model_weights(network).__members__
    if not known:
        raise WrongArgumentError(f"torchvision publishes no weights of {network}")
    version = version.upper() or ("IMAGENET1K_V1" if "IMAGENET1K_V1" in known else next(iter(known)))
    if version not in known:
        raise WrongArgumentError(f"torchvision has no weights {version} of {network}; {suggestion(version, known)}")
    return str(known[version].url)


def _fetch(address: str) -> Path:
    """Return the file of torch's cache for what is at an address, which is downloaded once."""
    path = Path(torch.hub.get_dir(), "checkpoints", address.partition("?")[0].rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), progress=False)
        except (URLError, OSError) as error:
            raise OSError(
                f"{address} cannot be fetched ({error}); download it where there is a network, and give the file, or put it at "
                f"{path}"
            ) from error
    return path


def _fetch_timm(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except RuntimeError as error:  # it has no weights
        raise WrongArgumentError(f"timm publishes no weights of {name}: {error}") from error
    except OSError as error:
        raise OSError(
            f"the weights of {_TIMM}{name} cannot be fetched ({error}); save timm.create_model({name!r}, pretrained=True)"
            ".state_dict() with torch.save where there is a network, and give the file"
        ) from error


def read_torch_file(path: Path, map_location: str = "cpu") -> Any:
    """Return the content of a file of tensors and plain data; it can execute nothing.

    Objects of other classes, such as the `HistoryBuffer` in a checkpoint of MMEngine, become empty stand-ins of that name.

    Raises:
        FileNotFoundError: There is no such file.
        WrongArgumentError: It is another kind of file, or truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in _names_in(path)]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # what the unpickler raises on a foreign file is anything: KeyError, EOFError, ...
        # torch wraps it in advice to load without checks
        reason = str(error.__context__ or error).partition("\n")[0]
        raise WrongArgumentError(
            f"{path} cannot be read as tensors and plain data saved by torch ({type(error).__name__}: {reason}); "
            "it is another kind of file, or truncated"
        ) from error


class _StandIn:
    """Stands for an object of another library, and knows nothing of it."""

    def __new__(cls, *args: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dictionary:
    """Makes a plain dictionary, which the unpickler fills."""

    def __new__(cls, *args: Any) -> Any:
        return {}


def _stand_in(name: str) -> type:
    if name == "collections.defaultdict":
        return _Dictionary
    module, _, short = name.rpartition(".")
    return type(short, (_StandIn,), {"__module__": module})


def _names_in(path: Path) -> Iterator[str]:
    """Yield the names of the classes and functions in a file, `package.module.Name`; torch makes those that it trusts itself."""
    if zipfile.is_zipfile(path):
        yield from torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return
    with path.open("rb") as file:  # before torch 1.6: pickles, the weights' in the fourth
        for _ in range(4):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    yield re.sub("^__builtin__ ", "builtins ", str(argument)).replace(" ", ".")
