"""Methods: what trains, the same from the same seed, in fp32; and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from keeptune.errors import RecipeError
from keeptune.model import methods
from keeptune.model.methods import (
    Method,
    ParameterCounts,
    apply_method,
    check_fit,
    check_method,
    count_parameters,
)
from tests.model.tiny import CONFIGS, T5, make_model, trained_state

# Pyright does not see through the decorator of transformers' `to`.
META: Any = torch.device("meta")
CONV1D = ["Set methods.mine.peft_type=LORA, which adapts this model's Conv1D layers."]


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **settings})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


def t5(**settings: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    config = T5Config(**{**sizes, **settings})
    return T5ForConditionalGeneration(config).eval()


def granite() -> PreTrainedModel:
    return make_model(CONFIGS["granite"])


def method(peft_type: str | None, name: str = "mine", **arguments: Any) -> Method:
    return Method(name=name, peft_type=peft_type, learning_rate=1e-3, arguments=arguments)


def adapted_modules(model: torch.nn.Module, part: str = "lora_A") -> set[str]:
    return {name.partition(f".{part}")[0].rpartition(".")[2] for name in trained_state(model) if f".{part}" in name}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 9, 4, 1]])).logits


def test_full_trains_every_weight_and_wraps_nothing() -> None:
    model = llama()
    adapted = apply_method(model, method(None), seed=0)
    assert adapted is model
    total = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(adapted) == ParameterCounts(trained=total, total=total)


def test_tied_weights_count_once() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert count_parameters(untied).total - count_parameters(tied).total == 64 * 32
    assert len(trained_state(untied)) - len(trained_state(tied)) == 1


def test_lora_takes_every_linear_layer_of_llama_but_the_head_by_default() -> None:
    adapted = apply_method(llama(), method("LORA", r=4), seed=0)
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted_modules(adapted) == expected
    # r·(in + out) for q, k, v, o, gate, up, down; two layers.
    assert count_parameters(adapted).trained == 2 * 4 * (64 + 48 + 48 + 64 + 96 + 96 + 96)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"q", "k", "v", "o", "wi", "wo"}),
        ({"feed_forward_proj": "gated-gelu"}, {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}),
    ],
)
def test_lora_takes_every_linear_layer_of_t5s_attention_and_feed_forward(
    settings: dict[str, str], expected: set[str]
) -> None:
    adapted = apply_method(t5(**settings), method("LORA"), seed=0)
    assert adapted_modules(adapted) == expected
    assert not [name for name in trained_state(adapted) if "lm_head" in name or "shared" in name]


def test_lora_takes_gpt2s_conv1d_layers_without_a_warning() -> None:
    adapted = apply_method(gpt2(), method("LORA", target_modules="all-linear"), seed=0)
    assert adapted_modules(adapted) == {"c_attn", "c_proj", "c_fc"}


def test_named_targets_are_taken_as_named() -> None:
    adapted = apply_method(llama(), method("LORA", target_modules=["q_proj", "v_proj"], use_dora=True), seed=0)
    assert adapted_modules(adapted) == {"q_proj", "v_proj"}
    assert any("lora_magnitude_vector" in name for name in trained_state(adapted))


@pytest.mark.parametrize(
    ("peft_type", "arguments"),
    [
        ("LORA", {"lora_dropout": 0.1}),
        ("IA3", {}),
        ("LOHA", {"r": 2}),
        ("OFT", {"oft_block_size": 4, "target_modules": "all-linear"}),
        ("VERA", {"r": 8}),
        ("PROMPT_TUNING", {"num_virtual_tokens": 4}),
        ("PREFIX_TUNING", {"num_virtual_tokens": 4}),
    ],
)
def test_the_seed_alone_decides_new_weights(peft_type: str, arguments: dict[str, Any]) -> None:
    first, second = llama(), llama()
    torch.manual_seed(11)
    one = apply_method(first, method(peft_type, **arguments), seed=3)
    drawn = torch.rand(3)
    torch.manual_seed(12)
    two = apply_method(second, method(peft_type, **arguments), seed=3)
    for (name, left), right in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    torch.manual_seed(11)
    assert torch.equal(torch.rand(3), drawn), "the global random state moved"


def test_another_seed_gives_other_weights() -> None:
    states = [trained_state(apply_method(llama(), method("LORA"), seed=seed)) for seed in (0, 1)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_fresh_lora_gives_the_base_models_logits() -> None:
    expected = logits(llama())
    assert torch.equal(logits(apply_method(llama(), method("LORA"), seed=0).eval()), expected)


@pytest.mark.parametrize("chosen", [method(None), method("LORA", modules_to_save=["lm_head"]), method("IA3")])
def test_trained_weights_are_fp32_over_a_bf16_base(chosen: Method) -> None:
    adapted = apply_method(llama().bfloat16(), chosen, seed=0)
    assert {tensor.dtype for tensor in trained_state(adapted).values()} == {torch.float32}
    frozen = {parameter.dtype for parameter in adapted.parameters() if not parameter.requires_grad}
    assert frozen == (set() if chosen.peft_type is None else {torch.bfloat16})


@pytest.mark.parametrize(
    ("chosen", "parts"),
    [
        (method("LORRA"), ["methods.mine.peft_type: found 'LORRA'", "Did you mean 'LORA'?"]),
        (method("ZZZZ"), ["found 'ZZZZ'", "Choose from: ", "IA3", "LOHA"]),
        (method("LORA", lora_alhpa=4), ["methods.mine.lora_alhpa: found an unknown key", "Did you mean 'lora_alpha'?"]),
        (
            method("LORA", learning_rte=1e-4),
            ["mine.learning_rte: found an unknown key", "Did you mean 'learning_rate'?"],
        ),
        (method("IA3", r=8), ["methods.mine.r: found an unknown key", "PEFT's IA3Config"]),
        (method("LORA", inference_mode=True), ["methods.mine.inference_mode", "keeptune sets it"]),
        (method("LORA", eva_config={"rho": 2}), ["methods.mine.eva_config", "statistics of the data"]),
        (method("LORA", init_lora_weights="pissa_niter_4"), ["methods.mine.init_lora_weights", "expected it unset"]),
        (method("LORA", init_lora_weights="eva"), ["methods.mine.init_lora_weights", "expected it unset"]),
        (method("LORA", megatron_core="os"), ["methods.mine.megatron_core", "it needs Megatron"]),
        (method("ADALORA", total_step=100), ["methods.mine.total_step: found 100", "keeptune counts the steps"]),
        (method("ADALORA", r=4), ["methods.mine.r: found 4", "AdaLoRA has init_r and target_r in its place"]),
        (method("ADALORA", init_lora_weights="pissa"), ["methods.mine.init_lora_weights", "a start of its own"]),
        (
            method("ADALORA", init_r=8),
            ["methods.mine.init_r: found 8 with a target_r of 8", "ranks only shrink. Set methods.mine.init_r=13."],
        ),
        (
            method("PREFIX_TUNING"),
            ["methods.mine.num_virtual_tokens: found nothing; expected how many input vectors train, from 1. Set"],
        ),
        (method("P_TUNING", num_virtual_tokens="4"), ["methods.mine.num_virtual_tokens: found '4'; expected a number"]),
        (method("P_TUNING", num_virtual_tokens=4.5), ["methods.mine.num_virtual_tokens: found 4.5; expected how"]),
        (method("LORA", r="eight"), ["methods.mine.r: found 'eight'; expected a number. Fix this value."]),
        (method("ADALORA", init_r=[4]), ["methods.mine.init_r: found [4]; expected a number. Fix this value."]),
        (method("LORA", lora_dropout=True), ["methods.mine.lora_dropout: found True; expected a number."]),
        (method("PROMPT_TUNING", num_virtual_tokens=0), ["methods.mine.num_virtual_tokens: found 0; expected how"]),
        (method("POLY"), ["found 'POLY'", "number of a task"]),
        (method("XLORA"), ["found 'XLORA'", "trained before"]),
        (method("CPT"), ["found 'CPT'", "a loss of its own"]),
        (
            method("LORA", target_modules="q", layers_to_transform=[1]),
            ["PEFT refuses this LORA", "layers_to_transform"],
        ),
        (method(None, r=8), ["methods.mine: found r without peft_type", "Add methods.mine.peft_type"]),
    ],
)
def test_a_wrong_method_is_refused(chosen: Method, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_method(chosen, encoder_decoder=False)
    for part in parts:
        assert part in str(caught.value)


def test_all_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"(?s)methods\.mine\.rr.*methods\.mine\.lora_drop\b"):
        check_method(method("LORA", rr=1, lora_drop=0.1), encoder_decoder=False)


def test_full_fine_tuning_of_a_quantised_base_is_refused_and_lora_is_not() -> None:
    with pytest.raises(RecipeError, match=r"methods\.mine: found full fine-tuning of a quantised base model"):
        check_method(method(None), encoder_decoder=False, quantised=True)
    check_method(method("LORA"), encoder_decoder=False, quantised=True)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (method("LOHA"), "methods.mine.peft_type: found 'LOHA' over a quantised base model, whose weights PEFT does"),
        (method("LORA", init_lora_weights="pissa"), "methods.mine.init_lora_weights: found 'pissa' over a quantised"),
        (method("LORA", use_dora=True), "methods.mine.use_dora: found it set over 8-bit weights, whose norms PEFT"),
    ],
)
def test_what_needs_the_values_of_quantised_weights_is_refused(chosen: Method, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_method(chosen, encoder_decoder=False, quantised="8bit")
    assert str(caught.value).startswith(message)
    check_method(method("LORA", use_dora=True), encoder_decoder=False, quantised="4bit")


@pytest.mark.parametrize(
    "peft_type", [None, "LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "LN_TUNING", "MISS", "OSF", "ADALORA"]
)
@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_methods_with_defaults_are_accepted(peft_type: str | None, encoder_decoder: bool) -> None:
    check_method(method(peft_type), encoder_decoder=encoder_decoder)


@pytest.mark.parametrize(
    ("make", "chosen", "parts"),
    [
        (
            llama,
            method("LORA", target_modules=["q_proj", "v_porj"]),
            ["methods.mine.target_modules: found 'v_porj'", "Did you mean 'v_proj'?"],
        ),
        (llama, method("LORA", modules_to_save=["lm_heads"]), ["mine.modules_to_save: found 'lm_heads'", "'lm_head'"]),
        (llama, method("LORA", target_modules="q_proj"), ["PEFT refuses this LORA", "q_proj"]),
        (llama, method("BOFT", boft_block_size=5), ["PEFT refuses this BOFT", "Change the keys of methods.mine"]),
        (gpt2, method("LOHA"), ["PEFT refuses this LOHA for this model", "Conv1D", *CONV1D]),
        (gpt2, method("OSF"), ["methods.mine: found no weight that would train; expected at least one.", *CONV1D]),
        (llama, method("OSF", effective_rank=64), ["no weight that would train", "Lower methods.mine.effective_rank"]),
        (granite, method("VERA"), ["Name the modules that it is to adapt in methods.mine.target_modules."]),
        (llama, method("LORA", target_parameters=["x.y"]), ["target_parameters=['x.y'] were set but no parameter was"]),
        (t5, method("ADAPTION_PROMPT", adapter_len=2, adapter_layers=1), ["PEFT refuses this ADAPTION_PROMPT", "t5"]),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_refused(
    make: Callable[[], PreTrainedModel], chosen: Method, parts: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        apply_method(make(), chosen, seed=0)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_a_model_without_weights_tells_which_arguments_fit(make: Callable[[], PreTrainedModel]) -> None:
    check_fit(make().to(META), method("LORA", r=4, use_dora=True))
    check_fit(make().to(META), method("PROMPT_TUNING", num_virtual_tokens=4))
    with pytest.raises(RecipeError, match=r"PEFT refuses this LORA for this model: `r` should be a positive integer"):
        check_fit(make().to(META), method("LORA", r=0))


@pytest.mark.parametrize("chosen", [method("FROD"), method("UNILORA")])
def test_a_method_that_looks_at_values_of_weights_passes_without_them(chosen: Method) -> None:
    check_fit(llama().to(META), chosen)
    with pytest.raises(RecipeError, match="found 'query'"):
        check_fit(llama().to(META), Method("mine", chosen.peft_type, 1e-3, {"target_modules": ["query"]}))


@pytest.mark.parametrize("make", [llama, gpt2, t5])
@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "P_TUNING"])
def test_a_prefix_for_layers_that_are_not_there_is_refused(make: Callable[[], PreTrainedModel], peft_type: str) -> None:
    depth = make().config.num_hidden_layers
    check_fit(make().to(META), method(peft_type, num_virtual_tokens=4, num_layers=depth))
    message = f"methods.mine.num_layers: found {depth + 1}; expected {depth}, the number of the model's layers, which"
    with pytest.raises(RecipeError, match=message):
        check_fit(make().to(META), method(peft_type, num_virtual_tokens=4, num_layers=depth + 1))


def test_only_linear_layers_are_listed_to_choose_from() -> None:
    with pytest.raises(RecipeError) as caught:
        check_fit(llama().to(META), method("LORA", target_modules=["zzz"]))
    listed = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
    expected = "methods.mine.target_modules: found 'zzz'; expected a module of the model. Choose from: "
    assert str(caught.value) == f"{expected}{listed}."


@pytest.mark.parametrize("name", [*CONFIGS, "t5"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_embeddings_and_the_first_layers_stay_frozen(name: str, number: int) -> None:
    model = make_model(T5 if name == "t5" else CONFIGS[name])
    head: Any = model.get_output_embeddings()
    tied = model.get_input_embeddings().weight is head.weight
    apply_method(model, Method("mine", None, 1e-3, {}, frozen_layers=number), seed=0)
    trained = set(trained_state(model))
    layer = re.compile(r"(?:layers|h|encoder\.block)\.(\d+)\.")
    for full_name, _ in model.named_parameters():
        found = None if full_name.startswith("decoder.") else layer.search(full_name)
        embeds = bool(re.search(r"(embed_tokens|embed_positions|embed_in|wte|wpe|shared)\.weight", full_name))
        frozen = embeds or (found is not None and int(found[1]) < number)
        assert (full_name not in trained) == frozen, full_name
    assert sum(layer.search(n) is not None and not n.startswith("decoder.") for n in trained) == 0 or number == 1
    assert head.weight.requires_grad != tied


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (llama, "found 3; expected at most 2, the number of the model's layers. Lower it."),
        (t5, "found 3; expected at most 2, the number of the encoder's layers. Lower it."),
    ],
)
def test_more_frozen_layers_than_there_are_are_refused(make: Callable[[], PreTrainedModel], parts: str) -> None:
    chosen = Method("mine", None, 1e-3, {}, frozen_layers=3)
    with pytest.raises(RecipeError) as caught:
        check_fit(make().to(META), chosen)
    assert str(caught.value) == f"methods.mine.frozen_layers: {parts}"
    check_fit(make().to(META), Method("mine", None, 1e-3, {}, frozen_layers=2))


def test_a_lack_of_memory_is_no_fault_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(methods, "get_peft_model", lacking)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        apply_method(llama(), method("LORA"), seed=0)


def test_a_model_of_which_nothing_would_train_is_refused() -> None:
    model = llama()
    model.requires_grad_(False)
    with pytest.raises(RecipeError, match="found no weight that would train"):
        apply_method(model, method(None), seed=0)


def test_a_layer_that_cannot_be_called_with_one_input_gets_no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Routed(torch.nn.Linear):
        def forward(self, input: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:  # pyright: ignore
            return super().forward(input) * routes

    monkeypatch.setattr(Routed, "__module__", "transformers.models.made")
    model = llama()
    part: Any = model.model.layers[0].mlp
    part.down_proj = Routed(part.down_proj.in_features, part.down_proj.out_features, bias=False)
    adapted = apply_method(model, Method("lora", "LORA", 1e-3, {"r": 2}), seed=0)
    assert not any("down_proj" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert any("up_proj" in name for name, p in adapted.named_parameters() if p.requires_grad)
