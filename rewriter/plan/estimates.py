"""What is estimated of a kernel: what a program holds, and how long the kernel takes."""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 255  # a thread may have
SHARED = 166_912  # bytes a program may have on every Nvidia GPU from sm_80 on
SHARED_MOST = 232_448  # on sm_90 and later
SHARED_AMD = 65_536  # and on an AMD one of the gfx9 family


@dataclass(frozen=True)
class Registers:
    """A thread's wish: `hot` values are used for every tile; `cold` ones, addresses, are spilled first."""

    hot: float
    cold: float

    @property
    def wanted(self) -> int:
        return round(self.hot + self.cold)

    @property
    def spilled(self) -> int:
        """How many do not fit."""
        return max(0, self.wanted - REGISTERS)


@dataclass(frozen=True)
class Held:
    """What a program holds: registers that a thread wants, bytes of shared memory, and how many programs fit at once.

    `asynchronous` are products by wgmma. `shared_amd` are the bytes on an AMD GPU.
    """

    registers: Registers
    shared: int
    shared_amd: int
    residents: int
    asynchronous: bool

    @property
    def may_fit(self) -> bool:
        """Whether a program fits on some GPU, and most of its tiles stay in registers."""
        return self.shared <= SHARED_MOST and self.registers.spilled <= REGISTERS


@dataclass(frozen=True)
class KernelCost:
    """One kernel: its time at nominal sizes, the unit that is busiest, and what a program holds."""

    seconds: float
    bound: str
    held: Held

    @property
    def excess(self) -> float:
        """By how much it is no candidate: 0 where a program fits, and most of its tiles stay in registers."""
        if self.held.shared > SHARED:
            return float("inf")
        spilled = self.held.registers.spilled
        return spilled if spilled > REGISTERS else 0

    @property
    def unfit(self) -> str:
        """The same in words."""
        if self.held.shared > SHARED:
            return f"wants {self.held.shared / 1024:.0f} KiB of shared memory, of {SHARED // 1024}"
        return f"spills {self.held.registers.spilled} registers a thread" if self.excess else ""

    @property
    def portable(self) -> bool:
        """Whether a program fits on AMD GPUs too."""
        return self.held.shared_amd <= SHARED_AMD
