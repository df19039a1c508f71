"""Rules of the house: which way imports point, that paths which a text names exist, and one version of every tool."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import structure

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    if (ROOT / name).is_file()
]  # fmt: skip
NAMES = {path.name for path in FILES}
PATH_ENDS = {
    "/".join(parts[i:]) for path in FILES for parts in [path.relative_to(ROOT).parts] for i in range(len(parts))
}

# What each part may import of the others: tests → benchmarks → tools → package, never back.
PARTS = {
    "python/anchor_attention": {"anchor_attention"},
    "tools": {"anchor_attention", "tools"},
    "benchmarks": {"anchor_attention", "tools", "benchmarks"},
    "scripts": {"anchor_attention"},
    "examples": {"anchor_attention", "examples"},
    "docs": {"anchor_attention", "tools"},
    "tests": {"anchor_attention", "tools", "benchmarks", "scripts", "examples", "tests"},
}
EVERY_PART = {"anchor_attention", "tools", "benchmarks", "scripts", "examples", "docs", "tests"}

# Layers of the package, lowest first: a module imports from its own layer and those below.
LAYERS = (
    {"_context", "_dtypes", "_library", "_version", "argument_checks", "flops", "interrupts", "vmap"},
    {"block_mask", "distance_bias", "fake", "ops", "key_range_table", "patterns"},
    {"reference", "converters"},
    {"functional"},
    {"modules"},
    {"distributed", "integrations", "physics", "streaming", "benchmark", "__init__", "__main__"},
)


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, wherever in the file it does."""
    inside = path.relative_to(ROOT / "python" if (ROOT / "python") in path.parents else ROOT)
    package = inside.parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def python_files(folder: str) -> list[Path]:
    return [path for path in FILES if path.suffix == ".py" and (ROOT / folder) in path.parents]


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part: str) -> None:
    files = python_files(part)
    assert files
    for path in files:
        for module in imported_modules(path):
            top = module.split(".")[0]
            assert top not in EVERY_PART or top in PARTS[part], f"{path.relative_to(ROOT)} imports {module}"


def test_layers_of_the_package_point_one_way() -> None:
    height = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    for path in python_files("python/anchor_attention"):
        own = path.relative_to(ROOT / "python" / "anchor_attention").parts[0].removesuffix(".py")
        assert own in height, f"{own} has no layer in {Path(__file__).name}"
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] == "anchor_attention" and len(parts) > 1 and parts[1] in height:
                assert height[parts[1]] <= height[own], f"{path.relative_to(ROOT)} imports {module}"


def test_files_of_csrc_have_one_name_only_across_generations() -> None:
    folders: dict[str, list[str]] = {}
    for path in FILES:
        if (ROOT / "csrc") in path.parents and path.parent.name != "instantiations":
            folders.setdefault(path.name, []).append(path.parent.name)
    for name, parents in folders.items():
        assert len(parents) == 1 or set(parents) <= {"common", "sm80", "sm90"}, f"{name} is in {parents}"


def test_the_structure_of_a_revision_is_counted() -> None:
    cells = structure.measure("HEAD")
    counts = (cells[f"{part}: files, lines"].replace(",", "").split() for part in ("csrc", "all"))
    csrc, whole = (list(map(int, count)) for count in counts)
    command = ["git", "ls-tree", "-r", "--name-only", "HEAD", "csrc"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert csrc[0] == sum(name.endswith(structure.CODE) for name in names)
    assert all(total > part > 0 for total, part in zip(whole, csrc, strict=True))


PATH = re.compile(
    r"(?<![\w/.-])((?:csrc|python|tests|tools|benchmarks|docs|examples|scripts|cmake)/[\w./-]*\w)(?![\w*{<])"
)
# A path within a folder, as "sm90/config.h": some file's path ends with it.
PARTIAL_PATH = re.compile(r"(?<![\w/.*<>{$:~-])((?:[\w.-]+/)+[A-Za-z_]\w*\.(?:h|cpp|cuh|cu|py|md|sh|ptx))\b")
FILE = re.compile(r"(?<![\w/.*<{$-])([A-Za-z_]\w*\.(?:h|cpp|cuh|cu|py|md|sh|ptx))\b")
COMMENT = {
    ".py": re.compile(r'(?m)#.*$|"""[\s\S]*?"""'),
    **dict.fromkeys((".h", ".cpp", ".cu", ".cuh"), re.compile(r"(?m)//.*$|/\*[\s\S]*?\*/")),
}
# What texts name that is not in the repository: what a page tells its reader to write, what commands and CUDA make.
ELSEWHERE = re.compile(
    r"gate|^kernel\.ptx$|^programs\.sm_80\.ptx$|^cuda\.h$|^examples/(airfoil|windtunnel)/runs/|^python/anchor_attention/share$"
)


def prose(path: Path) -> str:
    """What a file says to readers: all of a page, the comments and docstrings of code."""
    if path.suffix in COMMENT:
        return "\n".join(COMMENT[path.suffix].findall(path.read_text()))
    is_prose = path.suffix in {".md", ".yml", ".yaml", ".toml", ".sh", ".cmake"} or path.name in {"Makefile", "run"}
    return path.read_text() if is_prose else ""


def exists(name: str, beside: Path) -> bool:
    return any((folder / name).exists() for folder in (ROOT, ROOT / "python", beside))


@pytest.mark.parametrize("path", [path for path in FILES if prose(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_that_a_text_names_exist(path: Path) -> None:
    text = prose(path)
    missing = {name for name in PATH.findall(text) if not exists(name, path.parent)}
    missing |= {name for name in FILE.findall(text) if name not in NAMES}
    missing |= {name for name in PARTIAL_PATH.findall(text) if name not in PATH_ENDS and not exists(name, path.parent)}
    assert not {name for name in missing if not ELSEWHERE.search(name)}


def test_a_test_that_reaches_another_machine_fails_at_once() -> None:
    with socket.socket() as outgoing, pytest.raises(RuntimeError, match=r"reaches 192\.0\.2\.1: only .* `network`"):
        outgoing.connect(("192.0.2.1", 9))


def test_every_place_pins_the_same_tools() -> None:
    pinned = dict(re.findall(r'"([\w-]+)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    hooks = re.findall(r'"([\w-]+)==([\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and all(pinned[tool] == version for tool, version in hooks)


# Where a page of Markdown has commands: a sentence may begin with "make sure".
CODE = re.compile(r"```[\s\S]*?```|`[^`]+`")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", ".github/workflows/ci.yml", ".ci/run", "docs"])
def test_make_targets_that_a_text_names_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    path = ROOT / page
    text = "\n".join(p.read_text() for p in path.glob("*.md")) if path.is_dir() else path.read_text()
    if path.is_dir() or path.suffix == ".md":
        text = "\n".join(CODE.findall(text))
    commands = re.findall(r"(?m)(?:(?:^|`|run: |&& |[A-Z]+=\S+ )make|^stage) ((?:[a-z0-9][a-z0-9-]*[ \t]*)+)", text)
    targets = {name for command in commands for name in command.split()}
    assert targets
    for name in targets:
        assert re.search(rf"(?m)^{re.escape(name)}:", makefile), f"{page}: make {name} is not a target"
