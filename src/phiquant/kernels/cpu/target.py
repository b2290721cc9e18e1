"""The processor that kernels are compiled for, and which lowering of the dot product it gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm

from ...errors import KernelError

__all__ = ["LOWERINGS", "Target", "host", "not_chosen"]

# Best first. Each names the features that its instructions need and those that a forced choice switches off.
_X86 = ("avx512vnni", "avxvnni", "avx2", "sse41")
_ARM = ("i8mm", "neon")
LOWERINGS = (*_X86, *_ARM, "generic")
_NEEDS = {
    "avx512vnni": ("avx512vnni", "avx512bw", "avx512vl", "avx512dq", "avx512f", "fma", "f16c"),
    "avxvnni": ("avxvnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "sse41": ("sse4.1", "ssse3"),
    "i8mm": ("i8mm", "dotprod"),
    "neon": ("dotprod",),
    "generic": (),
}


@dataclass(frozen=True)
class Target:
    """A processor as LLVM names it. `lowering` picks the instructions of `simd`'s dot products and shuffles."""

    triple: str
    cpu: str
    features: str
    lowering: str

    @property
    def arm(self) -> bool:
        """Whether it is a 64-bit Arm processor, whatever its lowering."""
        return _is_arm(self.triple)

    @property
    def vector_bytes(self) -> int:
        """Width of the registers that code is written for."""
        return {"avx512vnni": 64, "avxvnni": 32, "avx2": 32}.get(self.lowering, 16)

    @property
    def has_half(self) -> bool:
        """Whether half precision is converted by the processor."""
        return "+f16c" in self.features.split(",") or self.arm

    @property
    def has_fma(self) -> bool:
        """Whether a * b + c with one rounding is an instruction; else it is a slow call of the C library."""
        return "+fma" in self.features.split(",") or self.arm

    @property
    def has_bfloat_dot(self) -> bool:
        """Whether products of bfloat16 are added up in float32 by an instruction, of the wide registers used here."""
        return self.vector_bytes == 64 and "+avx512bf16" in self.features.split(",")

    def machine(self, *, jit: bool = True) -> Any:
        """LLVM's target machine."""
        t = llvm.Target.from_triple(self.triple)
        return t.create_target_machine(cpu=self.cpu, features=self.features, opt=3, jit=jit)


def _is_arm(triple: str) -> bool:
    return triple.startswith(("aarch64", "arm64"))


def _is_for(lowering: str, arm: bool) -> bool:
    """Whether a lowering is one of Arm processors, or of the others."""
    return lowering == "generic" or (lowering in _ARM) == arm


def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def host(forced: str | None = None) -> Target:
    """This machine's processor. `forced` (or PHIQUANT_LOWERING) asks for a lesser lowering.

    Raises:
        KernelError: the lowering asked for is unknown, or this processor lacks it.
    """
    _initialize()
    forced = forced or os.environ.get("PHIQUANT_LOWERING") or None
    triple = llvm.get_default_triple()
    have: dict[str, bool] = dict(llvm.get_host_cpu_features())
    arm = _is_arm(triple)
    possible = [name for name in LOWERINGS if _is_for(name, arm) and all(have.get(f) for f in _NEEDS[name])]
    if forced and forced not in LOWERINGS:
        raise KernelError(f"PHIQUANT_LOWERING={forced} is not one of {', '.join(LOWERINGS)}")
    if forced and forced not in possible:
        raise KernelError(f"this processor lacks the lowering '{forced}'; it has {', '.join(possible)}")
    lowering = forced or possible[0]
    if lowering == possible[0]:
        return Target(triple, llvm.get_host_cpu_name(), have_string(have), lowering)
    # A lesser lowering must not profit from what it stands without: only its own features are switched on.
    if arm:
        return Target(triple, "generic", ",".join(f"+{f}" for f in ("neon", *_NEEDS[lowering])), lowering)
    cpu = {"avxvnni": "alderlake", "avx2": "haswell", "sse41": "nehalem"}.get(lowering, "x86-64")
    return Target(triple, cpu, ",".join(f"+{f}" for f in _NEEDS[lowering]), lowering)


def have_string(features: dict[str, bool]) -> str:
    """LLVM's feature string of a feature table."""
    return ",".join(f"{'+' if on else '-'}{name}" for name, on in sorted(features.items()))


def not_chosen() -> dict[str, str]:
    """Every lowering but the host's, with the reason. Raises KernelError as `host`."""
    have: dict[str, bool] = dict(llvm.get_host_cpu_features())
    target = host()
    reasons: dict[str, str] = {}
    for name in LOWERINGS:
        missing = [feature for feature in _NEEDS[name] if not have.get(feature)]
        if not _is_for(name, target.arm):
            reasons[name] = "for another kind of processor"
        elif missing:
            reasons[name] = f"the processor lacks {', '.join(missing)}"
        elif LOWERINGS.index(name) < LOWERINGS.index(target.lowering):
            reasons[name] = f"PHIQUANT_LOWERING asks for {target.lowering}"
        elif name != target.lowering:
            reasons[name] = f"{target.lowering} is better"
    return reasons
