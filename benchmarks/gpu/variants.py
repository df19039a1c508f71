"""Other choices of tiles and rules, each compiled into a library of its own: ``python -m benchmarks.gpu.variants``.

Usage: python -m benchmarks.gpu.variants FOLDER [--only NAME …]     compiles them; no GPU is needed
       python -m benchmarks.gpu.variants --check [--only NAME …]    runs each on the emulator against float64

A variant is a copy of the sources with one line replaced, so the sources themselves know nothing of variants, and what
a table of tiles asserts of its rows is asserted of these, too. A library holds the kernels of bfloat16 at the head
sizes that `sweep` measures, and CPU kernels for any processor.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREES = ROOT / "build" / "variants"
LIBRARIES = ROOT / "build" / "gpu-variants"
LIBRARY = "libanchor_attention.so"
HEAD_DIMS = (64, 128)
FORWARD, BACKWARD = "forward", "backward"
_HOPPER = "csrc/kernels/cuda/sm90"
# What a tree holds: the library's sources, and what runs its kernels on the emulator.
_COPIED = (
    "CMakeLists.txt",
    "cmake",
    "csrc",
    "python/anchor_attention/_version.py",
    "tools",
    "tests/*.py",
    "tests/cuda",
)
# The emulator's cases: blocks that take several items; partial tiles, repeated and shared ranges. Whole names, because
# `-k` would find a head size in the name of the tree, too.
_CHECKS = {
    FORWARD: "tests/cuda/test_cuda_hopper_forward.py::test_blocks_take_several_items[{}-2]",
    BACKWARD: "tests/cuda/test_cuda_kernels.py::test_native_head_dims[bfloat16-False-sm90-{}]",
}


@dataclass(frozen=True)
class Variant:
    """One line of a source replaced.

    Attributes:
        name: Of its library.
        passes: The pass that it can change.
        head_dims: The head sizes that it can change.
        file: Below the root.
        old: What is replaced; occurs once.
        new: What replaces it.
    """

    name: str
    passes: str
    head_dims: tuple[int, ...]
    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """The file's text with the replacement.

        Raises:
            ValueError: If the text to replace is not there exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


def _tile(name: str, head_dim: int, new: str) -> Variant:
    rows = {64: "{64, 64, 3, 128, 3, 32, 160, 16, true}", 128: "{128, 64, 2, 128, 3, 56, 224, 0, true}"}
    return Variant(f"forward_{head_dim}_{name}", FORWARD, (head_dim,), f"{_HOPPER}/config.h", rows[head_dim], new)


def _rule(name: str, passes: str, file: str, old: str, new: str) -> Variant:
    return Variant(f"{passes}_{name}", passes, HEAD_DIMS, f"csrc/kernels/cuda/{file}", old, new)


# Rows of the forward's table: head size, channels of a slab, warpgroups that multiply, keys, stages, registers of
# producers and of consumers, one polynomial in so many exponentials, turns.
VARIANTS = (
    _tile("no_polynomial", 64, "{64, 64, 3, 128, 3, 32, 160, 0, true}"),
    _tile("polynomial_8", 64, "{64, 64, 3, 128, 3, 32, 160, 8, true}"),
    _tile("no_turns", 64, "{64, 64, 3, 128, 3, 32, 160, 16, false}"),
    _tile("2_consumers", 64, "{64, 64, 2, 128, 3, 56, 224, 16, true}"),
    _tile("2_stages", 64, "{64, 64, 3, 128, 2, 32, 160, 16, true}"),
    _tile("4_stages", 64, "{64, 64, 3, 128, 4, 32, 160, 16, true}"),
    _tile("no_turns", 128, "{128, 64, 2, 128, 3, 56, 224, 0, false}"),
    _tile("2_stages", 128, "{128, 64, 2, 128, 2, 56, 224, 0, true}"),
    _tile("polynomial_16", 128, "{128, 64, 2, 128, 3, 56, 224, 16, true}"),
    _rule("no_split", FORWARD, "common/schedule.cpp", "if (fills_alone || longest", "if (true || longest"),
    _rule("cheap_merge", FORWARD, "common/schedule.cpp", "kMergeCost = 3;", "kMergeCost = 1;"),
    _rule("one_sum", BACKWARD, "sm90/backward_schedule.cpp", "kMaxBytesOfOwnSums = 32 << 20", "kMaxBytesOfOwnSums = 0"),
    _rule("own_sums_to_128_mib", BACKWARD, "sm90/backward_schedule.cpp", "kMaxBytesOfOwnSums = 32 << 20",
          "kMaxBytesOfOwnSums = 128 << 20"),
    _rule("2_items", BACKWARD, "sm90/plan_backward.cpp", "PerMultiprocessor = 4;", "PerMultiprocessor = 2;"),
    _rule("1_item", BACKWARD, "sm90/plan_backward.cpp", "PerMultiprocessor = 4;", "PerMultiprocessor = 1;"),
    _rule("short_items", BACKWARD, "sm90/backward_schedule.cpp", "QueriesPerItem = 512;", "QueriesPerItem = 256;"),
)  # fmt: skip


def make_tree(variant: Variant | None, trees: Path = TREES) -> Path:
    """The sources with the variant's line replaced, as they are without one. Instantiations are those of HEAD_DIMS."""
    tree = trees / (variant.name if variant is not None else "shipped")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *_COPIED],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    wanted = {"upload", "elementwise_bfloat16"} | {f"{p}_bfloat16_{n}" for p in (FORWARD, BACKWARD) for n in HEAD_DIMS}
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, tree / name
        if source.parent.name == "instantiations" and source.stem not in wanted:
            continue
        content = source.read_bytes()
        if variant is not None and name == variant.file:
            content = variant.apply(content.decode()).encode()
        # What is as it was keeps its time, so that the build compiles it once.
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return tree


def build(variant: Variant | None, folder: Path) -> Path:
    """The variant's library in the folder, by its name."""
    tree = make_tree(variant)
    options = ("-DANCHOR_ATTENTION_CUDA=ON", "-DANCHOR_ATTENTION_CUDA_ARCHS=90", "-DANCHOR_ATTENTION_CPU_SETS=baseline")
    cmake = shutil.which("cmake") or "cmake"
    subprocess.run(
        [cmake, "-S", tree, "-B", tree / "made", f"-DPython3_EXECUTABLE={sys.executable}", *options], check=True
    )
    subprocess.run([cmake, "--build", tree / "made", "--parallel", str(os.cpu_count())], check=True)
    folder.mkdir(parents=True, exist_ok=True)
    (library,) = (tree / "made").rglob(LIBRARY)
    return Path(shutil.copy(library, folder / f"{tree.name}.so"))


def check(variant: Variant) -> None:
    """Runs the variant's kernels and plans on the emulator.

    Raises:
        subprocess.CalledProcessError: If a result is wrong, or the emulator reports an error.
    """
    tree = make_tree(variant)
    # What is built once per content, the emulator above all, is that of the checkout where the variant changes nothing.
    if not (tree / "build").exists():
        (tree / "build").symlink_to(ROOT / "build", target_is_directory=True)
    paths = os.pathsep.join(map(str, (tree, ROOT / "python")))
    names = [_CHECKS[variant.passes].format(head_dim) for head_dim in variant.head_dims]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--rootdir", tree, *names]
    subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": paths}, check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    names = [variant.name for variant in VARIANTS]
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu.variants", description=__doc__.splitlines()[0])
    command.add_argument("folder", nargs="?", type=Path, default=LIBRARIES)
    command.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    command.add_argument("--check", action="store_true", help="run them on the emulator instead")
    options = command.parse_args(arguments)
    chosen = [variant for variant in VARIANTS if variant.name in options.only]
    for variant in chosen:
        print(variant.name, flush=True)
        if options.check:
            check(variant)
        else:
            build(variant, options.folder)
    if not options.check:
        build(None, options.folder)
        total = sum(path.stat().st_size for path in options.folder.glob("*.so"))
        print(f"{options.folder}: {len(chosen) + 1} libraries, {total / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
