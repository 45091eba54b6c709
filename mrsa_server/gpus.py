"""The GPUs of this machine, from what their drivers say: `nvidia-smi`, and the kernel's own files for AMD's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_LEAST_BYTES = 4 << 30  # an AMD GPU with less is the graphics of a CPU, which tells of its own memory alone
_AMD = "0x1002"  # at the PCI bus
_DISPLAY, _ACCELERATOR = "0x03", "0x12"  # classes at the PCI bus


class Gpu(NamedTuple):
    """As its driver names it.

    Attributes:
        name: For people.
        memory_bytes: 0 where it shares the machine's memory, None where not known.
        uuid: By which a variable may name it, as by its place.
        maker: NVIDIA or AMD.
    """

    name: str
    memory_bytes: int | None
    uuid: str = ""
    maker: str = "NVIDIA"


@dataclass(frozen=True, slots=True)
class Gpus:
    """What was found.

    Attributes:
        seen: Those that a program started here may use.
        hidden: How many others there are.
        hidden_by: The variable that hides them, with its value.
        trouble: Why one that is there cannot be used, if so.
        mend: What helps.
    """

    seen: tuple[Gpu, ...] = ()
    hidden: int = 0
    hidden_by: str = ""
    trouble: str | None = None
    mend: str | None = None


def find_gpus(root: Path = Path("/")) -> Gpus:
    """Look for NVIDIA's, then for AMD's.

    Args:
        root: Of the file system; another one in tests.
    """
    nvidia, failure = _nvidia()
    if nvidia:
        return _shown(nvidia, ("CUDA_VISIBLE_DEVICES",))
    amd = tuple(_amd(root))
    if amd:
        device = root / "dev/kfd"
        if not os.access(device, os.R_OK | os.W_OK):
            if device.exists():
                why, mend = "this user may not open", "sudo usermod -aG render,video $USER   # and log in again"
            else:
                why, mend = (
                    "is not there",
                    "docker run --device /dev/kfd --device /dev/dri ...   # if this is a container",
                )
            return Gpus(trouble=f"{amd[0].name} cannot be used: /dev/kfd, by which it is reached, {why}", mend=mend)
        # ROCm's own comes first; HIP counts in what that leaves, and reads CUDA's where its own is not set.
        hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
        return _shown(amd, ("ROCR_VISIBLE_DEVICES", hip))
    if failure:
        return Gpus(trouble=failure, mend="sudo dmesg | grep -i nvrm   # a reboot helps after an update of the driver")
    if not (root / "sys/class/kfd").exists() and any(_amd_at_the_bus(root)):
        return Gpus(
            trouble="there is an AMD GPU, and no driver for computing with it (/sys/class/kfd is not there)",
            mend="sudo modprobe amdgpu   # or AMD's driver: https://rocm.docs.amd.com",
        )
    return Gpus()


def _nvidia() -> tuple[tuple[Gpu, ...], str | None]:
    """NVIDIA's, and why `nvidia-smi` does not tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), None
    words = [tool, "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return (), f"nvidia-smi fails: {error}"
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        return (), f"nvidia-smi fails: {said[:200] or f'exit status {done.returncode}'}"
    found = []
    for line in done.stdout.splitlines():
        uuid, _, rest = line.partition(",")
        name, comma, mib = rest.rpartition(",")
        if comma:
            found.append(Gpu(name.strip(), int(mib) << 20 if mib.strip().isdecimal() else 0, uuid.strip()))
    return tuple(found), None


def _shown(gpus: tuple[Gpu, ...], variables: Iterable[str]) -> Gpus:
    """Those that the variables leave, one after the other."""
    seen, by = gpus, []
    for variable in variables:
        value = os.environ.get(variable)
        if value is not None:
            seen = tuple(_named(seen, value))
            by.append(f"{variable}={value}")
    return Gpus(seen, max(len(gpus) - len(seen), 0), " ".join(by))


def _named(gpus: tuple[Gpu, ...], value: str) -> Iterator[Gpu]:
    """By place or by the beginning of their id, until the first that is none: so does CUDA."""
    for part in map(str.strip, value.split(",")):
        if part.startswith("MIG-"):
            yield Gpu("a part of a GPU (MIG)", None)
            continue
        named = [gpu for at, gpu in enumerate(gpus) if part and (part == str(at) or gpu.uuid.startswith(part))]
        if not named:
            return
        yield named[0]


def _amd(root: Path) -> Iterator[Gpu]:
    """Those that ROCm's driver shows, in its order."""
    nodes = root.glob("sys/class/kfd/kfd/topology/nodes/*")
    for node in sorted(nodes, key=lambda path: int(path.name) if path.name.isdecimal() else 0):
        facts = _properties(node / "properties")
        if not facts.get("simd_count"):
            continue  # a CPU
        banks = [_properties(bank) for bank in node.glob("mem_banks/*/properties")]
        # Of its own memory, what the CPU can reach (1) and what it cannot (2).
        memory = sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in {1, 2})
        if memory < _LEAST_BYTES:
            continue
        version = facts.get("gfx_target_version", 0)  # 90402 is gfx942
        name = f"AMD gfx{version // 10_000}{version // 100 % 100:x}{version % 100:x}"
        yield Gpu(name, memory, f"GPU-{facts.get('unique_id', 0):016x}", "AMD")


def _properties(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:  # nodes that a container is not given cannot be read
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _amd_at_the_bus(root: Path) -> Iterator[Path]:
    for device in root.glob("sys/bus/pci/devices/*"):
        try:
            maker, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if maker == _AMD and kind.startswith((_DISPLAY, _ACCELERATOR)):
            yield device
