"""Compiles CUDA sources to device code alone, and writes the C++ file that carries it in the library.

    device_code.py compile --nvcc PATH --ptxas PATH --compute 80 --native 80 90 --output STEM SOURCE [-- OPTIONS]
    device_code.py table --output FILE STEM...

The first makes PTX, machine code for every native architecture, and what the build tool has to know of the headers:
files that begin with STEM. The second lists what they hold under the names that launch plans use.

A driver runs the machine code of its own major release of CUDA and of older ones. PTX therefore leaves with the version
number of CUDA 12.1, which an assembler of CUDA 12 takes (it refuses what that version did not have), so that a library
that a newer compiler built also runs on drivers of CUDA 12.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# That of CUDA 12.1, the first whose kernels take more than 4 KiB of parameters, as the upload of tables does.
PTX_VERSION = "8.1"
# Of a cubin's header, and the first driver (as cuDriverGetVersion counts) that loads it.
ELF_MAGIC, ABI_VERSION_BYTE = b"\x7fELF", 8
DRIVER_OF_ABI = {7: 12010, 8: 13000}
# Before each image in the library, so that tools find it: these bytes, then the sizes of name and image.
IMAGE_MARK = "anchor-attention-gpu-code"

KERNELS = {
    "attention_backward_query": "backward_query",
    "attention_backward_key": "backward_key",
    "attention_backward": "backward",
    "attention_double_backward_query": "double_backward_query",
    "attention_double_backward_key": "double_backward_key",
    "attention_forward": "forward",
    "attention_jvp": "jvp",
    "attention_merge": "merge",
    "attention_query_gradient": "query_gradient",
    "attention_row_statistics": "row_statistics",
    "rope_freqs_gradient": "rope_freqs",
    "rope": "rope",
    "upload": "upload",
}
PRECISIONS = ("Bfloat16", "Float16", "Tf32x3", "Tf32")
KEY_GRADIENTS = {"0": "", "1": "_key", "2": "_value"}


@dataclass(frozen=True)
class Image:
    """Device code of one file for one target."""

    path: Path
    architecture: int
    is_ptx: bool


def plan_name(entry: str) -> str:
    """The name that launch plans give the kernel with this mangled name, as `KernelId::name` makes it."""
    function = next((name for name in KERNELS if f"{len(name)}{name}" in entry), None)
    if function is None:
        raise SystemExit(f"no launch plan names the kernel {entry}")
    name = KERNELS[function]
    precision = next((p for p in PRECISIONS if f"{len(p)}{p}E" in entry), None)
    head_dim = re.search(r"ELi(\d+)E", entry)
    suffix = ""
    if name == "backward" and re.search(r"QueryGradientE0E", entry):
        name = "backward_key"
    elif name.endswith("backward_key"):
        (gradients,) = re.findall(r"12KeyGradientsE(\d)E", entry)[:1]
        suffix = KEY_GRADIENTS[gradients]
    parts = ["sm90"] if "anchor_attention4sm90" in entry else []
    parts += [name, *([precision.lower()] if precision else []), *([head_dim[1]] if head_dim else [])]
    return "_".join(parts) + suffix


def lowered(ptx: str, *, keep_lines: bool) -> str:
    """PTX that says the oldest version, and nothing of source lines unless they are to be kept."""
    ptx, count = re.subn(r"^\.version\s+\S+", f".version {PTX_VERSION}", ptx, flags=re.MULTILINE)
    if count != 1:
        raise SystemExit("PTX with other than one .version")
    # A hint for analysis that is newer; it changes nothing that is computed.
    ptx = re.sub(r'^\s*\.pragma "used_bytes_mask [^"]*";\n', "", ptx, flags=re.MULTILINE)
    if keep_lines:
        return ptx
    # Of .loc and .file, and of the section of inlined names that .loc refers to.
    ptx = re.sub(r"^\s*\.(loc|file)\b.*\n", "", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\s*\.section\s+\.debug_str\s*\{.*?^\s*\}\s*\n", "", ptx, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^\s*(\$L__info_string\d+:|//.*)?\s*\n", "", ptx, flags=re.MULTILINE)


def run(command: list[str | Path]) -> None:
    result = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sys.stderr.write(result.stdout)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(str(part) for part in command)} failed with exit status {result.returncode}")


def compile_source(arguments: argparse.Namespace) -> None:
    """PTX and machine code of one source."""
    stem, raw = arguments.output, Path(f"{arguments.output}.raw.ptx")
    target, ptx = f"-arch=compute_{arguments.compute}", Path(f"{stem}.ptx")
    nvcc = [*arguments.launcher, arguments.nvcc]
    depfile = ["-MD", "-MT", ptx, "-MF", f"{stem}.d"]
    run([*nvcc, "-ptx", target, *arguments.options, *depfile, arguments.source, "-o", raw])
    ptx.write_text(lowered(raw.read_text(), keep_lines=arguments.keep_lines))
    raw.unlink()
    options = ["--warn-on-spills", *(["--generate-line-info"] if arguments.keep_lines else [])]
    for architecture in arguments.native:
        output = Path(f"{stem}.sm_{architecture}.cubin")
        run([arguments.ptxas, f"-arch=sm_{architecture}", *options, ptx, "-o", output])


def images_of(stem: Path) -> list[Image]:
    """Machine code first, oldest first, and PTX where a driver may compile it: not of the `a` architectures."""
    images = []
    for path in stem.parent.glob(f"{stem.name}.sm_*.cubin"):
        images.append(Image(path, int(re.findall(r"\.sm_(\d+)a?\.cubin$", path.name)[0]), False))
    images.sort(key=lambda image: image.architecture)
    ptx = Path(f"{stem}.ptx")
    (target,) = re.findall(r"^\.target\s+sm_(\w+)", ptx.read_text(), flags=re.MULTILINE)
    return images if target.endswith("a") else [*images, Image(ptx, int(target), True)]


def table(stems: list[Path]) -> str:
    """The C++ source."""
    code, images, kernels, driver = [], [], [], min(DRIVER_OF_ABI.values())
    n_images = 0
    for module, stem in enumerate(stems):
        own = images_of(stem)
        images.append(f"    {{{n_images}, {n_images + len(own)}}},")
        for image in own:
            if not image.is_ptx:
                header = image.path.read_bytes()[:16]
                if not header.startswith(ELF_MAGIC) or header[ABI_VERSION_BYTE] not in DRIVER_OF_ABI:
                    raise SystemExit(f"{image.path} is no machine code of a known CUDA")
                driver = max(driver, DRIVER_OF_ABI[header[ABI_VERSION_BYTE]])
            name = image.path.name
            code.append(
                f'ANCHOR_ATTENTION_IMAGE({n_images}, "{name}", {len(name)}, "{image.path.resolve()}", '
                f"{image.path.stat().st_size})"
            )
            n_images += 1
        for entry in re.findall(r"^\.visible \.entry (\w+)\(", Path(f"{stem}.ptx").read_text(), flags=re.MULTILINE):
            kernels.append((plan_name(entry), entry, module))
    names = [name for name, _, _ in kernels]
    if len(set(names)) != len(names):
        raise SystemExit(f"two kernels of one name: {sorted(name for name in names if names.count(name) > 1)}")
    every_image = [image for stem in stems for image in images_of(stem)]
    lines = [
        "// Made by cmake/device_code.py.",
        '#include "kernels/cuda/device_code.h"',
        "",
        "// Mark, sizes, name, image, and the zero that ends PTX.",
        "#define ANCHOR_ATTENTION_IMAGE(number, name, name_size, path, size)                                  \\",
        '  asm(".section .rodata.gpu_code,\\"a\\"\\n.balign 64\\n.ascii \\"' + IMAGE_MARK + '\\"\\n"             \\',
        '      ".8byte " #name_size ", " #size "\\n.ascii \\"" name "\\"\\n.balign 64\\n"                         \\',
        '      ".local gpu_image_" #number "\\ngpu_image_" #number ":\\n.incbin \\"" path "\\"\\n.byte 0\\n"      \\',
        '      ".previous\\n");',
        "",
        *code,
        "",
        'extern "C" {',
        *(f"extern const unsigned char gpu_image_{i}[];" for i in range(n_images)),
        "}",
        "",
        "namespace anchor_attention::cuda {",
        "namespace {",
        "",
        "const DeviceImage kImages[] = {",
        *(
            f"    {{gpu_image_{i}, {image.architecture}, {str(image.is_ptx).lower()}}},"
            for i, image in enumerate(every_image)
        ),
        "};",
        "const DeviceModule kModules[] = {",
        *images,
        "};",
        "// By name.",
        "const DeviceKernel kKernels[] = {",
        *(f'    {{"{name}", "{entry}", {module}}},' for name, entry, module in sorted(kernels)),
        "};",
        "",
        "}  // namespace",
        "",
        "const DeviceCode& device_code() {",
        f"  static constexpr DeviceCode kCode{{kImages, kModules, kKernels, {driver}}};",
        "  return kCode;",
        "}",
        "",
        "}  // namespace anchor_attention::cuda",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = command.add_subparsers(dest="step", required=True)
    compiling = steps.add_parser("compile")
    compiling.add_argument("--nvcc", required=True)
    compiling.add_argument("--ptxas", required=True)
    compiling.add_argument("--launcher", nargs="*", default=[], help="of the compiler, such as ccache")
    compiling.add_argument("--compute", required=True, help="architecture of the PTX")
    compiling.add_argument("--native", nargs="+", required=True, help="architectures of machine code")
    compiling.add_argument("--keep-lines", action="store_true", help="source lines, for profilers and sanitizers")
    compiling.add_argument("--output", type=Path, required=True)
    compiling.add_argument("source", type=Path)
    compiling.add_argument("options", nargs="*", help="for the compiler")
    tabulating = steps.add_parser("table")
    tabulating.add_argument("--output", type=Path, required=True)
    tabulating.add_argument("stems", nargs="+", type=Path)
    arguments = command.parse_args()
    if arguments.step == "compile":
        compile_source(arguments)
    else:
        arguments.output.write_text(table(arguments.stems))


if __name__ == "__main__":
    main()
