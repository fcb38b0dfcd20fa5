"""The pages stay true: commands parse, files and links exist, tables name what there is, snippets
import; and the library keeps its rooms apart."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT, SHARED

from utils.shards import items
from utils.shards.items import CELL_COLUMNS

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "README_DISTRIBUTED_INFERENCE.md", *DOCS)
}
README = PAGES["README.md"]
ALL = "\n".join(PAGES.values())
STORED = ROOT / "tests" / "shards" / "format_1" / "one" / "activations"  # a run of one process
# Flags of programs that are not ours, and of benchmarks that declare theirs in `main`.
FOREIGN = {"--user", "--worker", "--zone", "--command", "--accelerator-type", "--version"}
FOREIGN |= {"--recurse", "--scopes", "--xla_force_host_platform_device_count"}


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[list[str]]:
    """Every `python SCRIPT ...` and `python -m utils.shards ...`, continuation lines joined."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"\bpython ((?:-m utils\.\w+|[\w/]+\.py)[^\n;&|>'`]*)", text)
    return [shlex.split(command) for command in found]


COMMANDS = commands("\n".join(blocks("bash", ALL)))


def parser_of(script: str):
    """The parser of a script or of a module of the library; None for one that declares its flags
    in `main`."""
    if script.startswith("utils."):
        script += ".__main__"
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return module.build_parser() if hasattr(module, "build_parser") else None


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_commands_parse(command):
    script, *flags = command[1:] if command[0] == "-m" else command
    if script == "tests/gcs_server.py":
        assert len(flags) == 1 and (ROOT / script).exists()
    elif parser := parser_of(script):
        parser.parse_args(flags)
    else:
        source = (ROOT / script).read_text()
        assert all(f'"{flag}"' in source for flag in flags if flag.startswith("--"))


def test_no_command_is_overlooked():
    """Each script that a shell block names is one of the commands, and each script has one."""
    named = re.findall(r"[\w/]+\.py\b", "\n".join(blocks("bash", ALL)))
    assert sorted(named) == sorted(c[0] for c in COMMANDS if c[0] != "-m")
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)
    assert ["-m", "utils.shards", "merge"] in [command[:3] for command in COMMANDS]


def test_every_flag_that_a_page_names_exists():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    sources = [*scripts, *(ROOT / "utils").rglob("*.py")]
    declared = set(re.findall(r'"(--[\w-]+)"', "".join(path.read_text() for path in sources)))
    for script in ("simple_extraction_inference.py", "distributed_inference_with_activations.py"):
        declared |= set(parser_of(script)._option_string_actions)
    for script in ("examples/sae.py", "benchmarks/compare_sae_training.py"):
        declared |= set(parser_of(script)._option_string_actions)
    for page, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--\w[\w-]+", text)) <= declared | FOREIGN, page


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 260


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), link
        if anchor:
            text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
            assert anchor in map(slug, re.findall(r"^#+ (.*)", text, re.M)), link


def test_every_page_is_reached_from_the_readme():
    reached, waiting = {"README.md"}, ["README.md"]
    while waiting:
        page = waiting.pop()
        for link in re.findall(r"\]\(([^)#\s]+\.md)", PAGES[page]):
            path = ((ROOT / page).parent / link).resolve().relative_to(ROOT).as_posix()
            if path not in reached:
                reached.add(path)
                waiting.append(path)
    assert reached == set(PAGES)


def test_named_files_exist():
    named = set(re.findall(r"\b(?:tests|benchmarks|examples|utils|docs)/[\w./-]*\w", ALL))
    named |= set(re.findall(r"\brequirements[\w-]*\.txt", ALL))
    assert len(named) > 40
    for name in sorted(named):
        assert (ROOT / name).exists(), name


def test_the_tree_names_what_there_is():
    (tree,) = re.findall(r"^## The files\n.*?^```\n(.*?)^```", README, re.S | re.M)
    lines = [line.split()[0] for line in tree.splitlines() if not line.startswith(" " * 4)]
    rooms = [line.split()[0] for line in tree.splitlines() if re.match("  [a-z]", line)]
    folders = {
        path.parent.name + "/" for kind in ("py", "md") for path in ROOT.glob(f"[!.]*/*.{kind}")
    }
    assert folders | {path.name for path in ROOT.glob("*.py")} <= set(lines)
    assert [room.removesuffix(".py").rstrip("/") for room in rooms] == named_rooms()
    for line in set(lines) - set(rooms):
        assert (ROOT / line).exists(), line


def python_blocks() -> list[str]:
    return [block for page in PAGES.values() for block in blocks("python", page)]


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.splitlines()[0])
def test_snippets_import(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("utils"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("utils") for alias in node.names)


LOADING = re.search(r"```python\n(import pickle.*?)```", README, re.S)[1]


def test_the_loading_snippet_runs(tmp_path):
    shutil.copytree(STORED, tmp_path / "results" / "activations")
    out = subprocess.check_output([sys.executable, "-c", LOADING], cwd=tmp_path, text=True)
    samples = json.loads((STORED / "metadata.json").read_text())["total_samples"]
    assert f"Total samples: {samples}\n" in out
    assert f"Activations shape: ({samples}, " in out


def test_the_readme_has_the_quick_start():
    """Its commands, flags, files and loading snippet, as its author wrote them."""
    quickstart = SHARED / "quickstart.md"
    if not quickstart.exists():
        pytest.skip("the quick start is not here")
    text = quickstart.read_text()
    assert len(commands(text)) >= 4
    for command in commands(text):
        assert command in commands(README), command
    snippet = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert textwrap.dedent(snippet) == LOADING
    assert set(re.findall(r"--\w+", text)) <= set(re.findall(r"--\w+", README))
    (files,) = re.findall(r"^## Files after a full run\n\n(.*?)\n\n", text, re.S | re.M)
    for name in re.findall(r"[\w/]+\.(?:json|pkl)", files):
        assert name in README or name == "activations_batch_000002.pkl", name


def table(page: str, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGES[page], re.S | re.M)[1]


def keys_of(rows: str) -> set[str]:
    """What stands in backticks in the first column of a table."""
    first = [line.split("|")[1] for line in rows.splitlines() if line.startswith("| `")]
    return {key for cell in first for key in re.findall(r"`(\w+)`", cell)}


def test_the_keys_of_an_item():
    rows = table("docs/shards.md", "The keys of an item")
    assert keys_of(rows) == set(items._TYPES)
    row = next(line for line in rows.splitlines() if line.startswith("| `cells`"))
    assert tuple(re.findall(r"`(\w+)`", row))[1:] == CELL_COLUMNS


def test_the_keys_of_the_manifest():
    rows = table("docs/shards.md", "The keys of the manifest")
    manifest = json.loads((STORED / "metadata.json").read_text())
    assert manifest.keys() <= keys_of(rows)
    for name in ("model", "dataset", "prompt", "capture", "generation", "train_pairs"):
        row = next(line for line in rows.splitlines() if line.startswith(f"| `{name}`"))
        words = set(re.findall(r"\w+", row)) - {name}
        assert manifest[name].keys() <= words, name
    for key in (
        "non_finite",
        "interventions",
        "adapter",
        "quantization",
        "tokenizer_hash",
        "stop_ids",
    ):
        assert f"`{key}`" in rows  # which runs of format 1 were without, as this one is
    row = next(line for line in rows.splitlines() if line.startswith("| `files`"))
    assert manifest["files"][0].keys() <= set(re.findall(r"\w+", row))


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


def named_rooms() -> list[str]:
    """As the library itself lists them, in the order of the data."""
    return re.findall(r"^(\w+)  ", (ROOT / "utils" / "__init__.py").read_text(), re.M)


def test_the_library_names_its_rooms():
    assert sorted(named_rooms()) == sorted(room for rooms in TIERS for room in rooms)
