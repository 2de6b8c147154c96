"""Configurations that come with Widefield."""

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "configs"


def ready_configs() -> list[str]:
    """Their names, sorted; `load` takes a name in the place of a file."""
    return sorted(file.stem for file in FOLDER.glob("[!_]*.yaml"))


def summary(name: str) -> str:
    """What a ready configuration is for: its first line."""
    with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
