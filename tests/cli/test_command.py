"""The command itself: help, and what it imports."""

import os
import subprocess
import sys

import pytest

from widefield.cli import VERBS, main


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from widefield.cli import VERBS, main\n"
        "for arguments in (['--help'], *([verb, '--help'] for verb in VERBS), ['--version']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(arguments)\n"
        "print({'torch', 'lightning', 'numpy', 'rich', 'matplotlib', 'pyvips'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tarin"],
        ["predict"],
        ["demo", "--no-such-flag"],
        ["doctor", "--images", ".", "--workers", "0"],
        ["check", "timm/resnet10t", "--channels", "0"],
        ["predict", "--checkpoint", "c", "a.tif", "--tile-size", "0"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("tunables", ["", "glibc.malloc.mxfast=0", "glibc.malloc.tcache_count=3"])
def test_the_process_begins_again_only_where_the_c_library_needs_it(tunables: str) -> None:
    code = (
        "import os, sys\n"
        "from widefield import cli\n"
        "if sys.argv[1]: cli._glibc = lambda: (2, int(sys.argv[1]))\n"
        "cli._set_up_environment()\n"
        "print(os.environ['GLIBC_TUNABLES'], os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'], "
        "os.environ['THP_MEM_ALLOC_ENABLE'])"
    )
    found = {}
    for version in ("36", "38"):
        result = subprocess.run(
            [sys.executable, "-c", code, version],
            capture_output=True,
            text=True,
            check=True,
            env={k: v for k, v in os.environ.items() if "OMP_" not in k} | {"GLIBC_TUNABLES": tunables},
        )
        found[version] = result.stdout.split()
    set_by_user = "tcache" in tunables
    assert found["38"] == [*([tunables] if tunables else []), "PASSIVE", "2000", "1"]
    joined = tunables if set_by_user else ":".join(filter(None, (tunables, "glibc.malloc.tcache_count=0")))
    assert found["36"] == [joined, "PASSIVE", "2000", "1"]
