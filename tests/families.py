"""Tiny random models of the families that transformers has: a family's name arrives, its model leaves.

A family's configuration gets the sizes below that it has a field for; what else it needs stands in the tables.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

VOCAB_SIZE = 400
_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **{"hidden_size": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "d_kv": 8},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "word_embed_proj_dim": 32, "head_dim": 8},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2},
    **{"encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2},
    **{"max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "initializer_range": 0.3, "init_std": 0.3},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_head_dim": 8, "linear_num_heads": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 200},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "state_size": 16, "mamba_n_groups": 1},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_rate": 0.0, "hidden_dropout": 0.0},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "residual_dropout": 0.0, "layerdrop": 0.0},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    **{"sliding_window": 6, "rotary_dim": 8},
}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_CONV = {"layer_types": ["conv", "full_attention"]}
_WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}
_HEADS = {"num_key_value_heads": 4}
_SPARSE = {**_HEADS, "mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1}
_DECODER = {"is_decoder": True}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
_GEMMA_PART: dict[str, Any] = {
    **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 6},
    **{"initializer_range": 0.3, "attention_dropout": 0.0, "dropout_rate": 0.0, "pad_token_id": 0, **_WINDOW},
}
_VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
_SEQ2SEQ = {"decoder_start_token_id": 2}


def _each(names: str, own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: own for name in names.split()}


# What a decoder-only family needs beside the sizes. A name may have a variant behind a slash.
DECODERS: dict[str, dict[str, Any]] = {
    **_each(
        """
        afmoe apertus arcee biogpt bitnet bloom codegen cohere cpmant diffllama doge ernie4_5 ernie4_5_moe exaone_moe
        falcon falcon_mamba flex_olmo gemma glm glm4 glm4_moe gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_neox_japanese
        gpt_oss gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3
        jais2 jetmoe llama mamba minimax_m2 ministral ministral3 mistral mixtral mpt nanochat nemotron olmo olmo2 olmo3
        olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe rwkv seed_oss smollm3 solar_open
        stablelm starcoder2 vaultgemma xglm xlnet bert/bidirectional
        """,
        {},
    ),
    **_each("deepseek_v2 minicpm3 youtu", _HEADS),
    **_each("deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa", _SPARSE),
    **_each("qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid minimax", _LINEAR),
    **_each("lfm2 lfm2_moe", _CONV),
    **_each("gemma2 gemma3_text cohere2 exaone4", _WINDOW),
    **_each("bert bert-generation electra ernie rembert roberta roformer xlm-roberta", _DECODER),
    "bamba": {"attn_layer_indices": [1]},
    "ctrl": {"dff": 48},
    "dots1": {**_HEADS, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"text_config": _GEMMA_PART, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, **_WINDOW, **_PER_LAYER},
    "gemma4_text": {"global_head_dim": 8, **_WINDOW, **_PER_LAYER},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_HEADS, **_LINEAR},
    "llama4_text": {"attention_chunk_size": 4, "intermediate_size_mlp": 48},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "mixtral/router": {"output_router_logits": True},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
    },
    "phi3/longrope": {
        "rope_parameters": {**_LONGROPE, "original_max_position_embeddings": 16},
        "original_max_position_embeddings": 16,
    },
    "qwen2/window": {"use_sliding_window": True, "max_window_layers": 1, **_WINDOW},
    "qwen3_moe/router": {"output_router_logits": True},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 6},
    "reformer": {**_DECODER, "axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "xlm": {"emb_dim": 32, "n_words": VOCAB_SIZE, "causal": True},
    "xmod": {"default_language": "en_XX", **_DECODER},
    "zamba2": {
        **{"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
        **{"n_mamba_heads": 4},
    },
}
PAIRS: dict[str, dict[str, Any]] = {
    **_each(
        """
        bart bigbird_pegasus blenderbot blenderbot-small m2m_100 marian mbart mvp nllb-moe pegasus pegasus_x plbart
        seamless_m4t seamless_m4t_v2
        """,
        _SEQ2SEQ,
    ),
    **_each("longt5 mt5 switch_transformers t5 umt5", {"decoder_start_token_id": 0}),
    "fsmt": {**_SEQ2SEQ, "src_vocab_size": VOCAB_SIZE, "tgt_vocab_size": VOCAB_SIZE, "langs": ["en", "de"]},
    "led": {**_SEQ2SEQ, "attention_window": 8},
    "mbart/no-start": {},
    "prophetnet": {**_SEQ2SEQ, "num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 2},
    "t5gemma": {**_SEQ2SEQ, "encoder": _GEMMA_PART, "decoder": _GEMMA_PART},
    "t5gemma2": {
        **_SEQ2SEQ,
        "encoder": {"text_config": _GEMMA_PART, "vision_config": _VISION, "mm_tokens_per_image": 4},
        "decoder": _GEMMA_PART,
    },
}
# Their own loss is another than the cross-entropy of the next token: of several tokens ahead, or not shifted.
OTHER_LOSS = {"prophetnet", "xlm"}


def make_family(name: str) -> PreTrainedModel:
    """Return a random model of a family, in evaluation mode, with weights large enough that a leak would show."""
    pairs = name in PAIRS
    cls = CONFIG_MAPPING[name.partition("/")[0]]
    is_dataclass = dataclasses.is_dataclass(cls)
    known = {f.name for f in dataclasses.fields(cls)} if is_dataclass else set(inspect.signature(cls).parameters)
    own = (PAIRS if pairs else DECODERS)[name]
    config = cls(**{key: value for key, value in _SIZES.items() if key in known} | own)
    if pairs:
        config.decoder_start_token_id = own.get("decoder_start_token_id")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.03)
    return model.eval()
