"""Calls CMake, which is the one description of the build, and puts its library into the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Builds in build/cmake, or where ANCHOR_ATTENTION_BUILD_DIRECTORY says.

    The directory is kept: a second build compiles only what changed.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """Leaves out the suffix of Python's ABI, which the library has nothing to do with."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        build_directory = Path(os.environ.get("ANCHOR_ATTENTION_BUILD_DIRECTORY", ROOT / "build" / "cmake"))
        package_directory = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        options = [f"-DPython3_EXECUTABLE={sys.executable}"]
        for what in ("CUDA", "CUDA_ARCHS", "PTXAS", "SANITIZE"):
            name = f"ANCHOR_ATTENTION_{what}"
            if name in os.environ:
                options.append(f"-D{name}={os.environ[name]}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build_directory), *options], check=True)
            subprocess.run(["cmake", "--build", str(build_directory), "--parallel", jobs], check=True)
            subprocess.run(
                ["cmake", "--install", str(build_directory), "--prefix", str(package_directory.parent)], check=True
            )
        except FileNotFoundError:
            raise SystemExit("anchor-attention: CMake is missing; install it with 'pip install cmake'") from None

    def copy_extensions_to_source(self) -> None:
        """Puts what CMake installs beside the library into the source tree as well, for an editable installation."""
        super().copy_extensions_to_source()
        shutil.copytree(
            Path(self.build_lib) / "anchor_attention" / "share",
            ROOT / "python" / "anchor_attention" / "share",
            dirs_exist_ok=True,
        )


class PlatformWheel(bdist_wheel):
    """The library knows neither Python nor its ABI: one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        # setuptools keeps this directory and packs all that is in it: also modules that have since been removed.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


def project_urls() -> dict[str, str]:
    """Of the repository that ANCHOR_ATTENTION_URL names, as the workflow does: a fork's wheel names the fork."""
    home = os.environ.get("ANCHOR_ATTENTION_URL", "").rstrip("/")
    pages = {"Repository": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}
    return {name: home + page for name, page in pages.items()} if home else {}


setup(
    project_urls=project_urls(),
    ext_modules=[Extension("anchor_attention.libanchor_attention", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
