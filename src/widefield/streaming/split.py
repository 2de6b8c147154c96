"""Cutting a classifier in two modules: the trunk, which is local in space, and the head, which is not."""

import torch
from torch import fx, nn

from widefield.streaming.build import build
from widefield.streaming.capture import device_of, trace_module
from widefield.streaming.captured import CallKind, Node
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.program import Program, Stage

_EXAMPLE = (1, 3, 224, 224)


def split(model: nn.Module, image_shape: tuple[int, int, int, int] = _EXAMPLE) -> tuple[nn.Module, nn.Module]:
    """`(trunk, head)` with `head(trunk(image)) == model(image)`, made of the model's own submodules under their own names.

    The trunk is the longest beginning of the model that `StreamingCNN` can stream; the union of both state_dicts is the
    model's, but for what its forward does not use. `image_shape` (N, C, H, W) is a size that the model accepts.

    Raises `UnsupportedOpError` when the model begins with something that cannot be streamed, or when its forward cannot be cut
    (torch.fx must be able to trace it down to the layer where the trunk ends); `stream(model)` needs no such cut.

    Examples:
        >>> trunk, head = wf.split(torchvision.models.resnet18(num_classes=2))
        >>> trunk(torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 512, 2, 3])
    """
    parameter = next(model.parameters(), None)
    dtype = parameter.dtype if parameter is not None else torch.float32
    program = _program(model, image_shape, dtype, allow_whole=True)
    last = max(k for k, item in enumerate(program.items) if isinstance(item, Stage))
    tail = [item for item in program.items[last + 1 :] if isinstance(item, Node)]
    if not tail:
        return model, nn.Identity()
    whole = {node.module_path for node in tail}
    graph = _trace(model, whole)
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    first_whole = next(
        (k for k, node in enumerate(nodes) if node.op == "call_module" and _touches(node.target, whole)), len(nodes)
    )
    values = [value for stage in program.stages for value in stage.values]
    local = {value.module_path for value in values if value.reduction is None or value.module_path not in whole}
    before = nodes[:first_whole]
    last_local = max(
        (k for k, node in enumerate(before) if node.op == "call_module" and _touches(node.target, local)), default=-1
    )
    for end in range(first_whole, last_local, -1):  # functions between the two are tried, the longest trunk first
        trunk, head = _cut(model, graph, nodes[:end])
        if trunk is not None and head is not None and _is_local(trunk, image_shape, dtype):
            return trunk, head
    raise UnsupportedOpError(
        "", "split", "finds no place where a single map is handed from a local trunk to the rest",
        "use stream(model), which needs no cut, or pass the trunk and the head as two modules",
    )  # fmt: skip


def _touches(path: fx.node.Target, paths: set[str]) -> bool:
    """True if a module, or one inside it, is among `paths`."""
    return any(other == path or other.startswith(f"{path}.") for other in paths if other)


class _Tracer(fx.Tracer):
    """Goes into a module only where the trunk ends inside of it."""

    def __init__(self, local: set[str], whole: set[str]) -> None:
        super().__init__()
        self.local, self.whole = local, whole

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return path not in self.local or not _touches(path, self.whole) or super().is_leaf_module(module, path)


def _trace(model: nn.Module, whole: set[str]) -> fx.Graph:
    mixed = {path for path, part in model.named_modules() if path and any(True for _ in part.children())}
    try:
        return _Tracer(mixed, whole).trace(model)
    except Exception as error:
        raise UnsupportedOpError(
            "", "forward", f"cannot be cut: torch.fx fails to trace it ({type(error).__name__}: {error})",
            "use stream(model), which needs no cut, or pass the trunk and the head as two modules",
        ) from error  # fmt: skip


def _cut(model: nn.Module, graph: fx.Graph, inside: list[fx.Node]) -> tuple[nn.Module | None, nn.Module | None]:
    """The model up to `inside` and after it, if exactly one value is handed over."""
    image = next(node for node in graph.nodes if node.op == "placeholder")
    members = set(inside)
    handed = [node for node in inside if any(user not in members for user in node.users)]
    optional = [node for node in graph.nodes if node.op == "placeholder" and node is not image]
    if len(handed) != 1 or any(user not in members for user in image.users) or any(node.users for node in optional):
        return None, None
    trunk, head = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {image: trunk.placeholder("image")}
    for node in inside:
        copies[node] = trunk.node_copy(node, copies.__getitem__)
    trunk.output(copies[handed[0]])
    copies = {handed[0]: head.placeholder("features")}
    for node in graph.nodes:
        if node not in members and node.op != "placeholder":
            copies[node] = head.node_copy(node, copies.__getitem__)
    return fx.GraphModule(model, trunk, "Trunk"), fx.GraphModule(model, head, "Head")


def _is_local(trunk: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype) -> bool:
    try:
        program = _program(trunk, shape, dtype, allow_whole=False)
    except UnsupportedOpError:
        return False
    return isinstance(program.items[-1], Stage) and not program.items[-1].reductions


def _program(module: nn.Module, shape: tuple[int, int, int, int], dtype: torch.dtype, allow_whole: bool) -> Program:
    """Return the program for images of this one size, traced without symbols, which would take longer."""
    captured = trace_module(module, CallKind(shape, dtype, device_of(module)), symbolic=False).at(*shape[2:])
    assert captured is not None
    return build(captured, allow_whole=allow_whole)
