"""Which device a run computes on and in which number formats: decided here, and said in one line.

`look` asks the machine; `choose` is a pure function of what it saw and what the recipe says.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from keeptune.errors import RecipeError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
_FULL, _HALF = torch.float32, torch.bfloat16
# Where NVIDIA's driver shows itself on Linux, and under Windows' Linux.
_DRIVER_FILES: Final = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/nvidia-smi"))


@dataclass(frozen=True, slots=True)
class Machine:
    """The accelerator that torch sees, "cpu" where there is none.

    `has_bf16` says that it multiplies bf16 in hardware. `unused_gpu` says why torch cannot use a GPU that the machine
    has, "" where it has none or can.
    """

    kind: Literal["cpu", "cuda", "mps"]
    name: str = ""
    has_bf16: bool = False
    unused_gpu: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """The device of a run and its number formats.

    `compute` is what autocast casts to in training, None: fp32. `frozen` is the format of weights that do not train;
    those that train are fp32. `answering` is the format of a model's weights, and of what is computed, when it answers.
    """

    device: torch.device
    compute: torch.dtype | None
    frozen: torch.dtype
    answering: torch.dtype
    why: str

    @property
    def answering_autocast(self) -> torch.dtype | None:
        """What autocast casts to when a model answers, None: fp32."""
        return None if self.answering == _FULL else self.answering

    @property
    def validating_autocast(self) -> torch.dtype | None:
        """What autocast casts to when a model answers amid its training, frozen weights and trained ones as they are.

        Decoding would cast every weight anew for each token: on a processor that costs more than it saves.
        """
        return self.compute if self.device.type == "cuda" else None

    @property
    def trains_in(self) -> tuple[str, str]:
        """The device and the format that training computes in, by name."""
        return self.device.type, _name(self.compute or _FULL)

    def training_key(self) -> dict[str, str]:
        """Return what a trained model's key says of the device; nothing on a CPU, where the recipe says it all."""
        on, precision = self.trains_in
        return {} if on == "cpu" else {"computed_on": on, "computed_in": precision}

    def answers_key(self) -> dict[str, str]:
        """Return what the key of a model's answers says of the device; nothing on a CPU."""
        on = self.device.type
        return {} if on == "cpu" else {"answered_on": on, "answered_in": _name(self.answering)}


def look() -> Machine:
    """Ask torch and the system which accelerator there is."""
    if torch.cuda.is_available():
        # By default torch says yes for a GPU that only emulates bf16.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine("cuda", torch.cuda.get_device_name(), has_bf16)
    unused_gpu = ""
    if any(file.exists() for file in _DRIVER_FILES):
        reason = f"the installed torch {torch.__version__} is built without CUDA; install one that is built with it"
        if torch.version.cuda is not None:
            reason = f"torch {torch.__version__} sees none; look at CUDA_VISIBLE_DEVICES and the driver's version"
        unused_gpu = f"this machine has an NVIDIA GPU, but {reason}"
    if torch.backends.mps.is_available():
        return Machine("mps", "Apple GPU", unused_gpu=unused_gpu)
    return Machine("cpu", unused_gpu=unused_gpu)


def choose(machine: Machine, *, device: DeviceName, bf16: bool | None, between: bool) -> Policy:
    """Return the policy for a recipe's `device` and `training.bf16`; "auto" is an NVIDIA or AMD GPU, else the CPU.

    `between`: models are set between base and tuned weights that bf16 cannot tell apart. Their answers, and those that
    they are compared with, are then computed in fp32.

    Raises:
        RecipeError: the named device is not there.
    """
    if device not in {"auto", "cpu", machine.kind}:
        reason = machine.unused_gpu or "torch sees no such GPU"
        raise RecipeError(
            f"device: found {device!r}, but {reason}; expected a GPU that torch can use. Use device=auto or device=cpu."
        )
    kind = device if device != "auto" else "cuda" if machine.kind == "cuda" else "cpu"
    halved = (kind == "cuda" and machine.has_bf16) if bf16 is None else bf16
    on_cuda = kind == "cuda"
    fast = on_cuda and halved
    exact = fast and between
    where = f"{kind} ({machine.name})" if kind == machine.kind and machine.name else kind
    return Policy(
        torch.device(kind),
        compute=_HALF if halved else None,
        frozen=_HALF if fast else _FULL,
        answering=_HALF if fast and not exact else _FULL,
        why="; ".join([f"{where}, {_worded(machine, kind, bf16=bf16, halved=halved)}", *_notes(machine, kind, exact)]),
    )


def _worded(machine: Machine, kind: str, *, bf16: bool | None, halved: bool) -> str:
    words = "bf16" if halved else "fp32"
    if bf16 is not None:
        words += ", as training.bf16 says"
    if kind == "cuda" and not machine.has_bf16:
        words += ", which this GPU has no units for and emulates" if halved else ", as this GPU has no units for bf16"
    return words


def _notes(machine: Machine, kind: str, exact: bool) -> list[str]:
    notes = []
    if exact:
        notes.append("answers in fp32, because bf16 is too coarse for the steps between base and tuned weights")
    if kind == "cpu" and machine.unused_gpu:
        notes.append(machine.unused_gpu)
    if kind == "cpu" and machine.kind == "mps":
        notes.append("device=mps takes the Apple GPU, which has not been tried")
    return notes


def autocasting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Return a block inside which torch computes in `dtype` where it is safe to; None: as the tensors are."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def computes_short(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether tensors of `dtype` are computed here in a format shorter than fp32, by autocast or their own."""
    return dtype.itemsize < _FULL.itemsize or torch.is_autocast_enabled(device.type)


def widest(device: torch.device) -> torch.dtype:
    """Return the format to sum losses in: fp64, or fp32 on Apple's GPUs, which have no fp64."""
    return _FULL if device.type == "mps" else torch.float64


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given, so that the clock can be read."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
