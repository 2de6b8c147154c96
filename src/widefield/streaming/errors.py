"""The engine's own exceptions."""

from widefield.errors import WidefieldError


class UnsupportedOpError(WidefieldError):
    """The model holds an operation that cannot be streamed. Raised before any pixel is computed.

    `module_path` is the dotted name of the module that runs the operation ("" for the model itself), `op` its name, `reason` why
    it cannot be streamed, `remedy` what would remove the obstacle, `source` where it is called, if known.

    Examples:
        >>> class Sorted(nn.Module):
        ...     def forward(self, x):
        ...         return x.sort(3).values
        >>> try:
        ...     wf.StreamingCNN(Sorted(), tile_size=16)(torch.rand(1, 3, 32, 32))
        ... except wf.UnsupportedOpError as error:
        ...     print(error.op)
        aten.sort
    """

    def __init__(self, module_path: str, op: str, reason: str, remedy: str, source: str = ""):
        self.module_path = module_path
        self.op = op
        self.reason = reason
        self.remedy = remedy
        self.source = source
        where = f"layer '{module_path}'" if module_path else "the model's own forward"
        line = f"\n  called at {source}" if source else ""
        super().__init__(f"{where} cannot be streamed: {op} {reason}.{line}\n  What to do: {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.module_path, self.op, self.reason, self.remedy, self.source)


class VerificationError(UnsupportedOpError):
    """The model gave other results streamed than plain, on a small image, when it was streamed for the first time."""
