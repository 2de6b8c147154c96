"""Names of the files of a run, and of the models that there are, read from the libraries' files: importing them takes seconds."""

import fnmatch
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

NARROW_RESNETS = ("resnet10_w16", "resnet18_w8", "resnet18_w16", "resnet18_w32")
"""Those of `widefield.models.networks`, which needs torch."""

CONFIG, LAST, BEST = "config.yaml", "last.ckpt", "best.ckpt"
"""Files in the folder of a run of `widefield fit`."""

HUB_CONFIG, HUB_WEIGHTS, HUB_CARD = "config.json", "model.safetensors", "README.md"
"""Files in a folder that `widefield.save_pretrained` wrote."""

HUB_PREFIX = "hf-hub:"
"""Before the name of a model on the Hugging Face Hub."""

_TIMM = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_TORCHVISION = re.compile(
    r"^@register_model\((?:name=\"(\w+)\")?\)\n(?:@.*\n|    .*\n|\)\n)*?def (\w+)\(", re.MULTILINE
)


def list_models(pattern: str = "*", exclude: str | Iterable[str] = ()) -> list[str]:
    """Names that `get_model` takes: ready configurations, narrow ResNets, `torchvision/NAME` and `timm/NAME`.

    Args:
        pattern: With `*`, `?` and `[...]`, or a part of the name, with or without what stands before the slash; case counts for
            nothing.
        exclude: Patterns of names to leave out.

    Examples:
        >>> wf.list_models("resnet18_w*")
        ['resnet18_w8', 'resnet18_w16', 'resnet18_w32']
    """
    from widefield.config import ready_configs

    excluded = [exclude] if isinstance(exclude, str) else list(exclude)
    return [
        name
        for name in (*ready_configs(), *model_names())
        if matches(name, pattern) and not any(matches(name, one) for one in excluded)
    ]


def matches(name: str, pattern: str) -> bool:
    """True if the name of a model, or its part behind the slash, fits a pattern; one without wildcards is a part of a name."""
    pattern = (pattern if any(wildcard in pattern for wildcard in "*?[") else f"*{pattern}*").lower()
    return any(fnmatch.fnmatchcase(one.lower(), pattern) for one in (name, name.rpartition("/")[2]))


def model_names() -> list[str]:
    """Return the names that MODEL may be on the command line: `timm/NAME`, `torchvision/NAME`, names of narrow ResNets."""
    timm = (found[1] for text in _files("timm") for found in _TIMM.finditer(text))
    torchvision = (found[1] or found[2] for text in _files("torchvision") for found in _TORCHVISION.finditer(text))
    return [
        *NARROW_RESNETS,
        *(f"torchvision/{name}" for name in sorted(torchvision)),
        *(f"timm/{name}" for name in sorted(timm)),
    ]


def is_mentioned(package: str, name: str) -> bool:
    """True if a name of a network stands in the files of `timm` or `torchvision`, as names of former versions do, too."""
    word = re.compile(rf"\b{re.escape(name)}\b")
    return any(word.search(text) for text in _files(package))


def _files(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    files = (Path(spec.origin).parent / "models").rglob("*.py")
    return [file.read_text(encoding="utf-8") for file in files]
