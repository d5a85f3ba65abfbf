"""What is done with each family of docs/models.md, as a row of its table; `python -m tests.stages.sweep` writes it.

A family passes when the loss and gradients of a batch are transformers' own of the same records one by one, batched
answers are those of single prompts, and a model trained for a step, saved, and loaded by plain transformers gives the
answers that keeptune saw.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from keeptune.errors import RecipeError
from keeptune.evaluation.generate import Decoding, generate, prompts_side_by_side
from keeptune.model.artifact import save_artifact, verify_artifact
from keeptune.model.attention import base_of
from keeptune.model.folder import check_model_folder
from keeptune.model.load import load_model
from keeptune.model.loss import batch_loss, loss_is_exact
from keeptune.model.methods import Method, apply_method
from keeptune.model.modes import training
from keeptune.model.neighbours import layout_of, model_errors
from keeptune.progress import Silent
from keeptune.text.batches import pack, pad, pad_pairs
from keeptune.text.template import make_template
from keeptune.text.tokenizer import Tokenizer
from keeptune.text.tokens import Example
from tests.families import DECODERS, OTHER_LOSS, PAIRS, VOCAB_SIZE, make_family
from tests.tiny import chatml_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
LOSSES = {
    "packed": "packed",
    "padded": "padded",
    "pairs": "padded",
    "single": "one by one",
}
FAMILIES = (*sorted(DECODERS), *sorted(PAIRS))
ANSWERS = {"padded": "together", "equal": "together where prompts are equally long", "single": "one by one"}
TABLE = re.compile(r"(?<=<!-- families -->\n).*(?=<!-- end -->)", re.DOTALL)
LONGEST = 40
LIMIT = 6


def examples() -> list[Example]:
    generator = np.random.default_rng(0)
    return [
        Example(
            generator.integers(3, VOCAB_SIZE, size=prompt + answer, dtype=np.int32),
            np.arange(prompt + answer) >= prompt,
        )
        for prompt, answer in ((7, 5), (3, 9), (14, 4), (3, 2))
    ]


def own_loss(model: Any, example: Example, *, name: str) -> Tensor:
    """Return the sum over an example's targets of transformers' own loss, given the example alone."""
    ids, prompt, answer = (
        torch.from_numpy(ids.astype(np.int64))[None]
        for ids in (example.input_ids, example.prompt_ids, example.completion_ids)
    )
    if name in PAIRS:
        start = torch.tensor([[base_of(model).config.decoder_start_token_id]])
        inputs = {"input_ids": prompt, "decoder_input_ids": torch.cat([start, answer[:, :-1]], 1)}
        labels = answer
    else:
        inputs, labels = {"input_ids": ids}, torch.where(torch.from_numpy(example.loss_mask), ids, -100)
    if name in OTHER_LOSS:
        logits = model(**inputs, use_cache=False).logits[0]
        predicting = logits if name in PAIRS else logits[len(prompt[0]) - 1 : -1]
        return F.cross_entropy(predicting, answer[0], reduction="sum")
    return model(**inputs, labels=labels, use_cache=False).loss * answer.shape[1]


def gradients(model: nn.Module) -> Tensor:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.cat([gradient.flatten() for gradient in found])


def batched_loss(model: nn.Module, *, layout: str, through_logits: bool, pairs: bool) -> float:
    collate = pack if layout == "packed" else (lambda rows: (pad_pairs if pairs else pad)(rows, pad_id=0))
    rows = examples()
    total = 0.0
    for group in [[row] for row in rows] if layout == "single" else [rows]:
        loss = batch_loss(model, collate(group), through_logits=through_logits)
        loss.backward()
        total += loss.item()
    return total


def plain_answers(model: Any, prompts: Sequence[list[int]], *, pairs: bool) -> list[list[int]]:
    """Return what plain transformers answers to each prompt alone, by the generation config of the artifact."""
    model.eval()
    stops = model.generation_config.eos_token_id
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT)[0].tolist()
        answer = out[1:] if pairs else out[len(prompt) :]
        answers.append(answer[: next((i for i, token in enumerate(answer) if token in stops), len(answer))])
    return answers


def served(name: str, folder: Path) -> tuple[str, str]:
    """Put a family through all that a run does with it; return how its losses and its answers are batched."""
    pairs, base = name in PAIRS, folder / "base"
    chatml_tokenizer(base)
    make_family(name).save_pretrained(base)
    check_model_folder(base)
    model = load_model(base, device=torch.device("cpu"), dtype=torch.float32)
    with model_errors(model):
        through_logits = not loss_is_exact(model)
    layout = layout_of(model, through_logits=through_logits, longest=LONGEST)
    side_by_side = prompts_side_by_side(model, layout=layout, longest=LONGEST)
    with training(model), model_errors(model):
        expected = sum(own_loss(model, example, name=name).item() for example in examples())
        for example in examples():
            own_loss(model, example, name=name).backward()
        expected_gradients = gradients(model)
        found = batched_loss(model, layout=layout, through_logits=through_logits, pairs=pairs)
        found_gradients = gradients(model)
    assert abs(found - expected) <= 1e-4 * abs(expected), f"{name}: a loss of {found}, not {expected}, {layout}"
    difference = (found_gradients - expected_gradients).norm() / expected_gradients.norm()
    assert difference < 1e-3, f"{name}: gradients, {layout}"
    fit = {"layout": layout, "through_logits": through_logits, "pairs": pairs}
    decoding = {"tokens_per_batch": 10_000, "encoder_decoder": pairs, "max_positions": 128}
    for method in (Method("full", None, 1e-3, {}), Method("lora", "LORA", 1e-3, {"r": 2})):
        tuned = apply_method(load_model(base, device=torch.device("cpu"), dtype=torch.float32), method, seed=0)
        with training(tuned):
            batched_loss(tuned, **fit)
        take_step(tuned)
        artifact, stop_ids = save(tuned, folder / method.name, base=base, pairs=pairs)
        prompts = [example.prompt_ids.tolist() for example in examples()]
        answers = generate(
            tuned,
            prompts,
            decoding=Decoding(LIMIT, stop_ids, pad_id=0, side_by_side=side_by_side, **decoding),
            progress=Silent(),
            stop_requested=lambda: False,
        )
        verify_artifact(tuned, artifact, base=base)
        auto = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
        plain: Any = auto.from_pretrained(base if method.peft_type else artifact)
        if method.peft_type:
            plain = PeftModel.from_pretrained(plain, str(artifact))
            base_of(plain).generation_config = type(base_of(plain).generation_config).from_pretrained(artifact)
            base_of(plain).config.output_router_logits = False
        assert [a.ids for a in answers] == plain_answers(plain, prompts, pairs=pairs), f"{name}: {method.name}"
    return LOSSES[layout], ANSWERS[side_by_side]


@torch.no_grad()
def take_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= 0.05 * parameter.grad / parameter.grad.norm().clamp_min(1e-6)
    model.zero_grad()


def save(model: nn.Module, folder: Path, *, base: Path, pairs: bool) -> tuple[Path, tuple[int, ...]]:
    tokenizer = Tokenizer.load(base)
    template = make_template("plain", tokenizer=tokenizer, encoder_decoder=pairs)
    save_artifact(
        model,
        folder,
        base_name=str(base),
        tokenizer_folder=base,
        tokenizer=tokenizer,
        template=template,
        max_new_tokens=LIMIT,
        facts={"key": ""},
    )
    return folder, tuple(GenerationConfig.from_pretrained(folder).eos_token_id)


def label(name: str) -> str:
    """Return how the page names a family."""
    return name.replace("/", ", ")


def row(name: str) -> str:
    """Return a family's row of the page."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            losses, answers = served(name, Path(folder))
        except RecipeError as error:
            found = re.search(r"found (.*); expected", str(error).replace(folder, ""))
            assert found is not None, f"{name}: {error}"
            losses, answers = "refused", found[1]
    return f"| {label(name)} | {losses} | {answers} |"


def table() -> str:
    """Return the page's table."""
    return "\n".join(["| family | losses | answers |", "|---|---|---|", *map(row, FAMILIES), ""])


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
