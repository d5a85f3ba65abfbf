"""One rule says where a run computes and in which number formats, and says why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import keeptune
from keeptune.errors import RecipeError
from keeptune.model.device import Machine, autocasting, choose, computes_short, finish, look, widest

FULL, HALF = torch.float32, torch.bfloat16
H200 = Machine("cuda", "NVIDIA H200", has_bf16=True)
T4 = Machine("cuda", "Tesla T4", has_bf16=False)
MAC = Machine("mps", "Apple GPU")
PLAIN = Machine("cpu")
CPU_TORCH = Machine("cpu", unused_gpu="this machine has an NVIDIA GPU, but the installed torch is built without CUDA")


@pytest.mark.parametrize(
    ("machine", "asked", "device", "formats", "why"),
    [
        (PLAIN, {}, "cpu", (None, FULL, FULL), "cpu, fp32"),
        (PLAIN, {"bf16": True}, "cpu", (HALF, FULL, FULL), "cpu, bf16, as training.bf16 says"),
        (PLAIN, {"between": True}, "cpu", (None, FULL, FULL), "cpu, fp32"),
        (H200, {}, "cuda", (HALF, HALF, HALF), "cuda (NVIDIA H200), bf16"),
        (H200, {"device": "cuda"}, "cuda", (HALF, HALF, HALF), "cuda (NVIDIA H200), bf16"),
        (H200, {"device": "cpu"}, "cpu", (None, FULL, FULL), "cpu, fp32"),
        (H200, {"bf16": False}, "cuda", (None, FULL, FULL), "cuda (NVIDIA H200), fp32, as training.bf16 says"),
        (
            H200,
            {"between": True},
            "cuda",
            (HALF, HALF, FULL),
            "cuda (NVIDIA H200), bf16; answers in fp32, because bf16 is too coarse for the steps between base and "
            "tuned weights",
        ),
        (T4, {}, "cuda", (None, FULL, FULL), "cuda (Tesla T4), fp32, as this GPU has no units for bf16"),
        (
            T4,
            {"bf16": True},
            "cuda",
            (HALF, HALF, HALF),
            "cuda (Tesla T4), bf16, as training.bf16 says, which this GPU has no units for and emulates",
        ),
        (MAC, {}, "cpu", (None, FULL, FULL), "cpu, fp32; device=mps takes the Apple GPU, which has not been tried"),
        (MAC, {"device": "mps"}, "mps", (None, FULL, FULL), "mps (Apple GPU), fp32"),
        (MAC, {"device": "mps", "bf16": True}, "mps", (HALF, FULL, FULL), None),
        (CPU_TORCH, {}, "cpu", (None, FULL, FULL), f"cpu, fp32; {CPU_TORCH.unused_gpu}"),
    ],
)
def test_the_machine_and_the_recipe_decide(
    machine: Machine, asked: dict[str, Any], device: str, formats: tuple[Any, ...], why: str | None
) -> None:
    policy = choose(machine, **{"device": "auto", "bf16": None, "between": False, **asked})
    assert policy.device == torch.device(device)
    assert (policy.compute, policy.frozen, policy.answering) == formats
    assert why is None or policy.why == why


@pytest.mark.parametrize(
    ("machine", "device", "message"),
    [
        (PLAIN, "cuda", "device: found 'cuda', but torch sees no such GPU; expected"),
        (H200, "mps", "device: found 'mps', but torch sees no such GPU; expected"),
        (CPU_TORCH, "cuda", "built without CUDA; expected a GPU that torch can use. Use device=auto or device=cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_the_reason(machine: Machine, device: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose(machine, device=device, bf16=None, between=False)


def test_keys_hold_the_device_and_the_format_but_on_a_processor_nothing_new() -> None:
    plain = choose(PLAIN, device="auto", bf16=True, between=False)
    assert (plain.training_key(), plain.answers_key()) == ({}, {})
    fast = choose(H200, device="auto", bf16=None, between=True)
    assert fast.training_key() == {"computed_on": "cuda", "computed_in": "bfloat16"}
    assert fast.answers_key() == {"answered_on": "cuda", "answered_in": "float32"}
    old = choose(T4, device="auto", bf16=None, between=False)
    assert old.training_key() == {"computed_on": "cuda", "computed_in": "float32"}


def test_a_gpu_that_emulates_bf16_is_not_taken_for_one_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's own default says yes for a T4.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert look() == T4


def test_an_apple_gpu_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert look().kind == "mps"


def test_losses_are_summed_in_fp64_but_on_apples_gpus_which_have_none() -> None:
    assert widest(torch.device("cpu")) == widest(torch.device("cuda")) == torch.float64
    assert widest(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("room", ["model", "training"])
def test_no_other_file_that_computes_on_the_device_names_fp64(room: str) -> None:
    for path in sorted((Path(keeptune.__file__).parent / room).glob("*.py")):
        # The artifact's table only looks tolerances up.
        if path.name not in {"device.py", "artifact.py"}:
            assert not re.search(r"torch\.(double|float64)|\.double\(\)", path.read_text(encoding="utf-8")), path


def test_the_clock_is_read_when_the_gpu_has_done_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda", "mps"):
        finish(torch.device(name))
    assert waited == ["cuda", "mps"]


def test_what_computes_in_bf16_is_held_to_the_tolerance_of_bf16() -> None:
    cpu = torch.device("cpu")
    assert computes_short(cpu, HALF) and not computes_short(cpu, FULL)
    with autocasting(cpu, HALF):
        assert computes_short(cpu, FULL)
    with autocasting(cpu, None):
        assert not computes_short(cpu, FULL)
