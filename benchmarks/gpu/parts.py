"""What a machine with CUDA and PyTorch lacks for the campaign, in parts that travel one by one."""

import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import NormalizedName, canonicalize_name

from benchmarks.baselines.environments import pins, requirements_file
from benchmarks.record import ROOT
from bitsmoe_kernels.errors import BitsmoeError

HERE = Path(__file__).resolve().parent
PRESENT = HERE / "present.txt"
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34, 35)))
MARLIN = "_moe_C_stable_libtorch.abi3.so"
TAKEN = "taken.zip"
"""What travels of a part's wheel."""


@dataclass(frozen=True)
class Part:
    """What travels in one piece.

    Attributes:
        packages: pinned, with all they need; those that the machine has are left out.
        wheel: package too large to travel whole.
        taken: regular expression of what travels of it.
        flat: whether that lies in no folders when it is installed, and so is no package.
        site: folder it is installed into; "": its own.
    """

    packages: tuple[str, ...] = ()
    wheel: str = ""
    taken: str = ""
    flat: bool = False
    site: str = ""


VLLM = "vllm==0.26.0"
PARTS = {
    "base": Part(
        (
            "annotated-types==0.8.0", "highspy==1.16.0", "pydantic==2.14.3", "pydantic-core==2.50.4",
            "typing-extensions==4.16.0", "typing-inspection==0.4.5",
        )
    ),
    "kernels": Part(
        ("humming-kernels==0.1.10", "jinja2==3.1.6", "nvidia-ml-py==13.610.43", "pyelftools==0.32"),
        VLLM, f"vllm/{re.escape(MARLIN)}", flat=True,
    ),
    "gptq": Part(tuple(pins(requirements_file("gptq"))[1:])),
    "autoround": Part(tuple(pins(requirements_file("autoround"))[1:])),
    "serving": Part(
        (
            "apache-tvm-ffi==0.1.15.post2", "cachetools==8.0.2", "cbor2==6.3.0", "compressed-tensors==0.17.0",
            "fastapi==0.165.0", "httpcore2==2.16.2", "httpx2==2.16.2", "llguidance==1.7.0", "loguru==0.7.3",
            "msgspec==0.22.0", "openai==3.57.0", "openai-harmony==0.0.8", "opentelemetry-api==1.45.2",
            "partial-json-parser==0.2.1.1.post7", "pybase64==1.5.1", "pyzmq==27.3.0", "sniffio==1.3.1",
            "starlette==1.10.0", "truststore==0.10.5", "uvloop==0.23.0", "xgrammar==0.2.8",
        ),
        VLLM, r"vllm(-[^/]*)?/(?!vllm-rs$|third_party/(deep_gemm|fmha_sm100)/)(?!.*\.so$).*",
    ),
    "serving-core": Part(wheel=VLLM, taken=r"vllm/_C_stable_libtorch\.abi3\.so", site="serving"),
    "serving-experts": Part(wheel=VLLM, taken=f"vllm/{re.escape(MARLIN)}", site="serving"),
    "serving-attention": Part(wheel=VLLM, taken=r"vllm/vllm_flash_attn/_vllm_fa3_C\.abi3\.so", site="serving"),
}  # fmt: skip
"""What this project needs; other methods for a layer; libraries of quality baselines; vLLM, too large for one piece."""


def present(path: Path) -> set[NormalizedName]:
    """Names of the packages in a list, one a line, with or without a version."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(re.split(r"[=<>@ \[]", line)[0]) for line in lines if line}


def wanted(part: Part, there: set[NormalizedName]) -> list[str]:
    """The packages of a part that a machine lacks."""
    return [p for p in part.packages if canonicalize_name(p.partition("==")[0]) not in there]


def fetch(names: Sequence[str], out: Path, python: str, there: Path) -> dict[str, int]:
    """Download parts into folders of their names.

    Args:
        names: of PARTS.
        out: folder of the folders.
        python: version of the machine's Python, such as 3.12.
        there: list of what the machine has, see `present`.

    Returns:
        Bytes of each part.

    Raises:
        BitsmoeError: something cannot be downloaded.
    """
    have, sizes = present(there), {}
    for name in names:
        part, folder = PARTS[name], out / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        if missing := wanted(part, have):
            _download(missing, folder, python)
        if part.wheel:
            with tempfile.TemporaryDirectory() as scratch:
                _download([part.wheel], Path(scratch), python)
                (wheel,) = Path(scratch).glob("*.whl")
                _take(wheel, part, folder / TAKEN)
        sizes[name] = sum(f.stat().st_size for f in folder.iterdir())
    return sizes


def _download(packages: Sequence[str], folder: Path, python: str) -> None:
    platforms = [option for p in PLATFORMS for option in ("--platform", p)]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms, "--dest", str(folder),
        *packages,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise BitsmoeError(f"{' '.join(packages)} for Python {python} cannot be downloaded: {said[-1]}")


def _take(wheel: Path, part: Part, out: Path) -> None:
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            if re.fullmatch(part.taken, name):
                archive.writestr(Path(name).name if part.flat else name, whole.read(name))


def install(parts: Path, site: Path) -> list[str]:
    """Unpack parts into folders; what is there already stays.

    Args:
        parts: folder that `fetch` made, or some folders of it.
        site: folder of the folders.

    Returns:
        The parts that are there now.

    Raises:
        BitsmoeError: a part is damaged.
    """
    site.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        folder, target, done = parts / name, site / (part.site or name), site / f"{name}.done"
        if done.exists() or not folder.is_dir():
            continue
        if wheels := sorted(str(wheel) for wheel in folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
            found = subprocess.run(
                [*command, "--upgrade", "--target", str(target), *wheels], capture_output=True, text=True, check=False
            )
            if found.returncode:
                raise BitsmoeError(f"part {name} cannot be installed: {found.stderr.strip().splitlines()[-1]}")
        if (folder / TAKEN).exists():
            try:
                with zipfile.ZipFile(folder / TAKEN) as archive:
                    archive.extractall(target)
            except (zipfile.BadZipFile, zlib.error) as e:
                raise BitsmoeError(f"part {name} cannot be installed: {folder / TAKEN}: {e}") from None
        if name == "base":
            _register(target)
        done.touch()
    return [name for name in PARTS if (site / f"{name}.done").exists()]


def _register(site: Path) -> None:
    """Let vLLM find the plugin of sources that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = site / f"bitsmoe_vllm-{project['version']}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
