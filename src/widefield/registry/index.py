"""Names, kinds and summaries of components, read from their source without importing them."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent.parent
_Definition = ast.ClassDef | ast.FunctionDef

# fmt: off
_TORCHVISION = (
    "AugMix", "AutoAugment", "CenterCrop", "ColorJitter", "ElasticTransform", "GaussianBlur", "GaussianNoise",
    "Grayscale", "Identity", "JPEG", "Normalize", "Pad", "RGB", "RandAugment", "RandomAdjustSharpness",
    "RandomAffine", "RandomAutocontrast", "RandomChannelPermutation", "RandomCrop", "RandomEqualize",
    "RandomErasing", "RandomGrayscale", "RandomHorizontalFlip", "RandomInvert", "RandomPerspective",
    "RandomPhotometricDistort", "RandomPosterize", "RandomResize", "RandomResizedCrop", "RandomRotation",
    "RandomShortestSize", "RandomSolarize", "RandomVerticalFlip", "RandomZoomOut", "Resize", "ScaleJitter",
    "TrivialAugmentWide",
)
# fmt: on
"""Those of `torchvision.transforms.v2` that take an image, and whose arguments can be written down."""


@dataclass(frozen=True)
class Entry:
    """A name of a component."""

    name: str
    target: str
    """`package.module:Name`"""
    kind: str = ""
    summary: str = ""
    replaceable: bool = False
    """True if a user's component of that name takes its place without being forced to."""


def entries_of(
    names: Iterable[str], target: str, kind: str, docstring: str | None, replaceable: bool = False
) -> list[Entry]:
    """Return an entry for each of the names of a component, of which the first is its own."""
    first, *aliases = names
    summary = (docstring or "").strip().partition("\n")[0]
    return [
        Entry(first, target, kind, summary, replaceable),
        *(Entry(alias, target, kind, f"another name of {first}", replaceable) for alias in aliases),
    ]


def as_names(names: Any, argument: str) -> list[str]:
    """Return the names that `argument` gives: None, a name, or several."""
    names = [] if names is None else [names] if isinstance(names, str) else list(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a text or a list of texts, got {name!r}")
    return names


def registered_in(registry: str, *folders: str) -> list[Entry]:
    """Return the entries of all classes and functions that have the decorator `@REGISTRY.register_module(...)`.

    Nothing is imported: the kind is the `component_kind` of the class or of the nearest base class in these folders that has one,
    and the summary the first line of the docstring.

    Args:
        registry: The name of the variable, such as `MODELS`.
        folders: Folders of the package `widefield`, which are searched with all that is below them.
    """
    definitions = [one for folder in folders for one in _definitions(_PACKAGE / folder)]
    classes = {node.name: node for _, node in definitions if isinstance(node, ast.ClassDef)}
    return [
        entry
        for module, node in definitions
        for call in node.decorator_list
        if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{registry}.register_module"
        for entry in _entries(call, node, module, _kind(node, classes))
    ]


def _entries(call: ast.Call, node: _Definition, module: str, kind: str) -> list[Entry]:
    """Return the entries that a decorator makes of a class or function."""
    given = dict(zip(("name", "force"), call.args)) | {one.arg: one.value for one in call.keywords}
    values = {name: ast.literal_eval(value) for name, value in given.items()}
    names = [*(as_names(values.get("name"), "name") or [node.name]), *as_names(values.get("aliases"), "aliases")]
    target, docstring = f"{module}:{node.name}", ast.get_docstring(node)
    return entries_of(names, target, values.get("kind", kind), docstring, values.get("replaceable", False))


def transforms() -> list[Entry]:
    """Return the entries of transforms: those of torchvision and those of Widefield."""
    torchvision = (Entry(name, f"torchvision.transforms.v2:{name}", "", "from torchvision") for name in _TORCHVISION)
    return [*torchvision, *registered_in("TRANSFORMS", "data", "components/transforms")]


def _definitions(folder: Path) -> Iterator[tuple[str, _Definition]]:
    """Yield each class and function at the top level of the files below `folder`, with the name of its module."""
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(["widefield", *path.relative_to(_PACKAGE).with_suffix("").parts])
        for node in ast.parse(path.read_bytes(), str(path)).body:
            if isinstance(node, _Definition):
                yield module, node


def _kind(node: _Definition, classes: Mapping[str, ast.ClassDef]) -> str:
    if not isinstance(node, ast.ClassDef):
        return ""
    for line in node.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "component_kind":
            return str(ast.literal_eval(line.value))
    bases = (ast.unparse(base).rpartition(".")[2] for base in node.bases)
    return next(filter(None, (_kind(classes[base], classes) for base in bases if base in classes)), "")
