"""The machine that a figure was measured on: its processor and how busy it was."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import psutil
import torch
from cpuinfo import get_cpu_info

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""Instruction sets that decide how fast matrix products are."""


@dataclass(frozen=True)
class Machine:
    """A processor, or a processor and its GPUs."""

    processor: str
    flags: list[str]
    """The instruction sets of FLAGS that it has."""
    cores: int
    gpus: list[str]
    busy_cores: float
    """Cores that other programs used, in the second before the measurement."""

    @classmethod
    def now(cls) -> Self:
        """Look at this machine. Takes two seconds."""
        cores, cpu = psutil.cpu_count() or 1, _processor()
        return cls(
            processor=cpu.get("brand_raw", cpu["arch"]),
            flags=[flag for flag in FLAGS if flag in cpu["flags"]],
            cores=cores,
            gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
            busy_cores=round(psutil.cpu_percent(interval=1.0) * cores / 100, 2),
        )

    def __str__(self) -> str:
        flags = f" ({', '.join(self.flags)})" if self.flags else ""
        parts = [f"{self.cores} cores of {self.processor}{flags}", *self.gpus]
        return f"{' and '.join(parts)}, of which other programs used {self.busy_cores} before"


@cache
def _processor() -> dict[str, Any]:
    found: dict[str, Any] = get_cpu_info()
    return found
