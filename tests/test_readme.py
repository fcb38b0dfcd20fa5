"""The README stays true: its commands parse, its files exist, its tables name what there is."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from utils.shards.items import CELL_COLUMNS

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
    for name in named + re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", README + DISTRIBUTED):
        assert (ROOT / name).exists(), name


def test_cell_columns():
    row = next(line for line in README.splitlines() if line.startswith("| `cells`"))
    named = dict.fromkeys(word for word in re.findall(r"\w+", row) if word in CELL_COLUMNS)
    assert tuple(named) == CELL_COLUMNS


# Rooms by tier; a room imports from earlier tiers only, and in the first from those before it.
TIERS = (("errors",), ("cli", "store"), ("arc", "model"), ("prompt", "shards"))
TIERS += (("plan", "dataset"), ("run",))


def imports(path: Path) -> set[str]:
    """Every module of the library that a file imports, at any depth of indentation."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module or "")
    return {name for name in found if name.startswith("utils.")}


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_a_room_imports_from_rooms_before_it_only():
    tier = {room: number for number, rooms in enumerate(TIERS) for room in rooms}
    rooms = {path.stem for path in (ROOT / "utils").iterdir()} - {"__init__", "__pycache__"}
    assert rooms == set(tier)
    for path in sorted((ROOT / "utils").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts == ("utils", "__init__"):
            continue
        for name in imports(path):
            room = room_of(name)
            assert room == parts[1] or tier[room] < tier[parts[1]], (path, name)


def test_no_module_imports_itself_in_a_circle():
    graph = {}
    for path in (ROOT / "utils").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        graph[".".join(parts).removesuffix(".__init__")] = imports(path)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module in done:
            return
        for name in graph[module] & graph.keys():
            visit(name, (*way, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_library_names_its_rooms():
    named = re.findall(r"^(\w+)  ", (ROOT / "utils" / "__init__.py").read_text(), re.M)
    assert sorted(named) == sorted(room for rooms in TIERS for room in rooms)
