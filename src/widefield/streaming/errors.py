"""The engine's own exception."""


class UnsupportedOpError(Exception):
    """The model holds an operation that cannot be streamed. Raised before any pixel is computed.

    `module_path` is the dotted name of the module that runs the operation ("" for the model itself), `op` its name.
    """

    def __init__(self, module_path: str, op: str, reason: str, remedy: str, source: str = ""):
        self.module_path = module_path
        self.op = op
        where = f"layer '{module_path}'" if module_path else "the model's own forward"
        line = f"\n  called at {source}" if source else ""
        super().__init__(f"{where} cannot be streamed: {op} {reason}.{line}\n  What to do: {remedy}")
        self._parts = (module_path, op, reason, remedy, source)

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), self._parts
