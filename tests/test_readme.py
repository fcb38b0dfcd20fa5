"""The README stays true: its commands parse, its files exist, its tables name what there is."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

from utils.items import CELL_COLUMNS

README = (ROOT / "README.md").read_text()
DISTRIBUTED = (ROOT / "README_DISTRIBUTED_INFERENCE.md").read_text()


def commands() -> list[list[str]]:
    """Every `python SCRIPT ...` of the shell blocks, continuation lines joined."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README + DISTRIBUTED, re.S):
        if block.startswith(("gcloud", "mkdir")):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command)
                while words and "=" in words[0]:  # the environment
                    words.pop(0)
                if words[:1] == ["python"] and re.fullmatch(r"\w+\.py", words[1]):
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("command", commands(), ids=lambda words: " ".join(words)[:60])
def test_commands_parse(command):
    script, *flags = command
    module = importlib.import_module(script.removesuffix(".py"))
    module.build_parser().parse_args(flags)


def test_there_are_commands_for_every_script():
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert {command[0] for command in commands()} == scripts


def test_files_exist():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.S)[1]
    named = [line.split()[0] for line in tree.splitlines() if not line.startswith(" ")]
    assert len(named) > 5
    for name in named + re.findall(r"`((?:tests|benchmarks)/\w+\.py)`", README + DISTRIBUTED):
        assert (ROOT / name).exists(), name


def test_cell_columns():
    row = next(line for line in README.splitlines() if line.startswith("| `cells`"))
    named = dict.fromkeys(word for word in re.findall(r"\w+", row) if word in CELL_COLUMNS)
    assert tuple(named) == CELL_COLUMNS


def test_the_library_lists_its_modules_in_order():
    """utils/__init__.py names every module once, and none imports one that stands below it."""
    order = re.findall(r"^(\w+)  ", (ROOT / "utils" / "__init__.py").read_text(), re.M)
    modules = {path.stem for path in (ROOT / "utils").glob("*.py")} - {"__init__"}
    assert sorted(order) == sorted(modules)
    for i, name in enumerate(order):
        source = (ROOT / "utils" / f"{name}.py").read_text()
        imported = set(re.findall(r"^from utils\.(\w+) import", source, re.M))
        for names in re.findall(r"^from utils import (.+)", source, re.M):
            imported |= set(names.split(", "))
        assert imported <= set(order[:i]), (name, imported - set(order[:i]))
