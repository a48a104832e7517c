"""The supported families: from a transformers config to a `ModelConfig`.

One function a family; each refuses, with a sentence, the variants whose mathematics it does not have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from corolla.errors import UnsupportedModel
from corolla.models.config import Activation, ModelConfig, Rope, TensorNames

Config = Any  # a transformers PreTrainedConfig; transformers is slow to import and untyped

_LLAMA = TensorNames(
    prefixes=("model.", ""),
    blocks="layers",
    embedding="embed_tokens",
    final_norm="norm",
    head="lm_head",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
_GEMMA3 = dataclasses.replace(
    _LLAMA,
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_BLOOM = TensorNames(
    prefixes=("transformer.", ""),
    blocks="h",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    head="lm_head",
    qkv=("self_attention.query_key_value",),
    out="self_attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
_NEOX = TensorNames(
    prefixes=("gpt_neox.", ""),
    blocks="layers",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head="embed_out",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    gate=None,
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


_MOST = {"num_hidden_layers": 10_000, "hidden_size": 2**20, "num_attention_heads": 2**14, "vocab_size": 2**26}


def architecture(config: Config) -> ModelConfig:
    """The architecture of a model by its transformers config.

    Raises:
        UnsupportedModel: the family, or a variant of it, has no mathematics here; the sentence names it.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModel(f"the family {config.model_type!r} is not supported; supported are {', '.join(sorted(_FAMILIES))}")
    _check_sizes(config)
    try:
        found = family(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedModel(f"{config.model_type}: its config.json cannot be computed ({error!r})") from error
    _check_numbers(found)
    return found


def supported_families() -> tuple[str, ...]:
    return tuple(sorted(_FAMILIES))


def _bloom(config: Config) -> ModelConfig:
    if config.apply_residual_connection_post_layernorm:
        raise UnsupportedModel("bloom with apply_residual_connection_post_layernorm is not supported: no released checkpoint uses it")
    head_dim = config.hidden_size // config.n_head
    return ModelConfig(
        family="bloom",
        blocks=config.n_layer,
        hidden=config.hidden_size,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        intermediate=4 * config.hidden_size,
        vocabulary=config.vocab_size,
        # ALiBi sets no limit; BLOOM was trained on 2,048 tokens.
        context_length=getattr(config, "seq_length", None) or 2048,
        names=_BLOOM,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation="gelu_tanh",
        grouped_qkv=True,
        tied=config.tie_word_embeddings,
        scale=head_dim**-0.5,
        window=(None,) * config.n_layer,
        rope_of=(None,) * config.n_layer,
        alibi=torch.float32,
    )


def _llama_like(config: Config, names: TensorNames = _LLAMA, **more: Any) -> ModelConfig:
    if getattr(config, "mlp_bias", False) is None:
        raise UnsupportedModel(f"{config.model_type}: mlp_bias is neither true nor false in its config.json")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings: dict[str, Any] = {
        "family": config.model_type,
        "blocks": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "intermediate": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "names": names,
        "norm": "rms",
        "norm_eps": config.rms_norm_eps,
        "activation": _activation(config, config.hidden_act if hasattr(config, "hidden_act") else config.hidden_activation),
        "tied": config.tie_word_embeddings,
        "scale": head_dim**-0.5,
        "window": _windows(config),
        "ropes": (_rope(config, config.rope_parameters, head_dim),) if "ropes" not in more else (),
        "rope_of": (0,) * config.num_hidden_layers,
    }
    return ModelConfig(**{**settings, **more})


def _qwen3(config: Config) -> ModelConfig:
    return _llama_like(config, dataclasses.replace(_LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"))


def _gemma(config: Config) -> ModelConfig:
    return _llama_like(config, norm_offset=1.0, embedding_scale=config.hidden_size**0.5)


def _gemma2(config: Config) -> ModelConfig:
    return _llama_like(
        config,
        _GEMMA3,
        norm_offset=1.0,
        activation=_activation(config, config.hidden_activation),
        embedding_scale=config.hidden_size**0.5,
        scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        logits_softcap=config.final_logit_softcapping,
    )


def _gemma3(config: Config) -> ModelConfig:
    if config.use_bidirectional_attention:
        raise UnsupportedModel("gemma3 with bidirectional attention is no language model that generates")
    kinds = sorted(set(config.layer_types))
    return _llama_like(
        config,
        dataclasses.replace(_GEMMA3, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
        norm_offset=1.0,
        activation=_activation(config, config.hidden_activation),
        embedding_scale=config.hidden_size**0.5,
        scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        logits_softcap=config.final_logit_softcapping,
        ropes=tuple(_rope(config, config.rope_parameters[kind], config.head_dim, layer_type=kind) for kind in kinds),
        rope_of=tuple(kinds.index(kind) for kind in config.layer_types),
    )


def _falcon(config: Config) -> ModelConfig:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = config.hidden_size // heads
    two_norms = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    if config.new_decoder_architecture and not config.parallel_attn:
        raise UnsupportedModel(
            "falcon's new decoder architecture without parallel attention is not supported: no released checkpoint uses it"
        )
    names = dataclasses.replace(
        _BLOOM,
        embedding_norm=None,
        attention_norm="ln_attn" if two_norms else "input_layernorm",
        mlp_norm="ln_mlp" if two_norms else None if config.parallel_attn else "post_attention_layernorm",
    )
    rotary = not config.alibi
    return ModelConfig(
        family="falcon",
        blocks=layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads,
        head_dim=head_dim,
        intermediate=config.ffn_hidden_size,
        vocabulary=config.vocab_size,
        context_length=config.max_position_embeddings,
        names=names,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=_activation(config, config.activation),
        parallel=config.parallel_attn,
        grouped_qkv=True,
        tied=config.tie_word_embeddings,
        scale=head_dim**-0.5,
        window=(None,) * layers,
        ropes=(_rope(config, config.rope_parameters, head_dim),) if rotary else (),
        rope_of=(0 if rotary else None,) * layers,
        # Falcon was trained with ALiBi's products in bfloat16, and scales them like the scores.
        alibi=torch.bfloat16 if config.alibi else None,
        alibi_scale=head_dim**-0.5,
    )


def _gpt_neox(config: Config) -> ModelConfig:
    layers = config.num_hidden_layers
    head_dim = config.hidden_size // config.num_attention_heads
    return ModelConfig(
        family="gpt_neox",
        blocks=layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        context_length=config.max_position_embeddings,
        names=_NEOX,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        activation=_activation(config, config.hidden_act),
        parallel=config.use_parallel_residual,
        grouped_qkv=True,
        tied=config.tie_word_embeddings,
        scale=head_dim**-0.5,
        window=(None,) * layers,
        ropes=(_rope(config, config.rope_parameters, head_dim),),
        rope_of=(0,) * layers,
    )


_FAMILIES: dict[str, Callable[[Config], ModelConfig]] = {
    "bloom": _bloom,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_neox": _gpt_neox,
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _qwen3,
}


def _check_sizes(config: Config) -> None:
    """Raises `UnsupportedModel` for sizes that are no counts, before anything is made of so many."""
    for name, most in _MOST.items():
        value = getattr(config, name, None)
        if not (type(value) is int and 0 < value <= most):
            raise UnsupportedModel(f"{config.model_type}: {name} is {value!r} in its config.json and has to be an integer from 1 to {most}")


def _check_numbers(arch: ModelConfig) -> None:
    """Raises `UnsupportedModel` for numbers with which nothing can be computed."""
    counts = {"head_dim": arch.head_dim, "key heads": arch.kv_heads, "intermediate size": arch.intermediate, "context": arch.context_length}
    counts |= {"window": min((window for window in arch.window if window is not None), default=1)}
    for name, value in counts.items():
        if not (isinstance(value, int) and value > 0):
            raise UnsupportedModel(f"{arch.family}: its {name} is {value!r} in its config.json, and has to be an integer of at least 1")
    if arch.heads % arch.kv_heads:
        raise UnsupportedModel(f"{arch.family}: {arch.heads} heads cannot share {arch.kv_heads} key heads evenly")
    factors = {"norm_eps": arch.norm_eps, "scale": arch.scale, "rope's factor": min((rope.factor for rope in arch.ropes), default=1.0)}
    factors["soft cap"] = min((cap for cap in (arch.attention_softcap, arch.logits_softcap) if cap is not None), default=1.0)
    for name, factor in factors.items():
        if not (isinstance(factor, (int, float)) and 0 < factor < math.inf):
            raise UnsupportedModel(f"{arch.family}: its {name} is {factor!r} in its config.json, and has to be a number above 0")
    if any(not bool(rope.inverse_frequencies.isfinite().all()) for rope in arch.ropes):
        raise UnsupportedModel(f"{arch.family}: its rotary embedding's frequencies are not finite: its rope_theta is damaged")


def _activation(config: Config, name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise UnsupportedModel(f"{config.model_type}: the activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _windows(config: Config) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    for kind in set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{config.model_type}: attention of the kind {kind!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: Config, parameters: dict[str, Any], head_dim: int, layer_type: str | None = None) -> Rope:
    kind = parameters["rope_type"]
    if kind == "default":
        rotary_dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        return Rope(1.0 / parameters["rope_theta"] ** exponents)
    if kind not in ("linear", "llama3", "yarn"):  # the others change their frequencies with the length of the text
        raise UnsupportedModel(f"{config.model_type}: rotary embeddings of the type {kind!r} are not supported")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    where = {} if layer_type is None else {"layer_type": layer_type}
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", **where)
    return Rope(frequencies.float(), factor)
