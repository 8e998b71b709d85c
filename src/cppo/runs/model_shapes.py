"""The sizes of a model that decide the memory of training, from its configuration alone."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from cppo.assets import adapter_base, resolve_model
from cppo.errors import UserError, one_line
from cppo.runs.checks import check_model

MAX_LAYERS, LAYER_FIELDS = 1000, ("num_hidden_layers", "depth")
REASON_WORDS = 30
"""Words kept of transformers' reason for refusing a configuration."""


@dataclass(frozen=True)
class ModelShapes:
    """Sizes of a vision-language model with a dense decoder. All are numbers of items, not of bytes.

    Attributes:
        hidden, layers, intermediate: of the decoder.
        heads, key_heads, head_dim: of its attention.
        vocabulary: rows of the output layer.
        tied: whether the output layer is the embedding.
        weights: of the whole model.
        layer_weights: of one decoder layer.
        linear: inputs and outputs of a decoder layer's linear layers, where adapters are.
        vision_hidden, vision_layers, vision_intermediate: of the vision tower.
        vision_heads: of its attention.
        vision_rotates: whether its attention rotates queries and keys.
        patches_per_token: patches of an image that become one token.
        patch_values: pixel values of a patch.
    """

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    weights: int
    layer_weights: int
    linear: tuple[tuple[int, int], ...]
    vision_hidden: int
    vision_layers: int
    vision_intermediate: int
    vision_heads: int
    vision_rotates: bool
    patches_per_token: int
    patch_values: int

    @property
    def head_weights(self) -> int:
        """Weights of the output layer, and so of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def end_weights(self) -> int:
        """Weights of embedding and output layer together."""
        return self.head_weights * (1 if self.tied else 2)


def read_shapes(name: str) -> ModelShapes:
    """The sizes of a packaged model, a folder, a config.json, an adapter's model or a hub name. Loads no weights.

    Raises:
        UserError: there is no such model, it has no vision tower, its decoder is a mixture of experts, or its
            configuration lacks a size.
    """
    folder = str(Path(name).parent) if Path(name).name == "config.json" and Path(name).is_file() else name
    if Path(folder).is_file():
        raise UserError(f"model: {name} is not named config.json: put it into a folder under that name")
    check_model(folder)
    folder = adapter_base(folder) or folder

    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

    try:
        folder = str(resolve_model(folder))
        _check_layers(name, PreTrainedConfig.get_config_dict(folder)[0])
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text, vision = config.get_text_config(), config.vision_config
        experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts")
        with torch.device("meta"):
            model = None if experts else AutoModelForImageTextToText.from_config(config)
    except UserError:
        raise
    except Exception as error:  # a configuration may hold anything, and each family reads it in its own way
        reason = " ".join(one_line(error).split()[:REASON_WORDS])
        raise UserError(f"model: transformers cannot build a model from {name}'s config.json: {reason}") from error
    if model is None:
        raise UserError(f"model: {name} is a mixture of experts; `cppo plan` does not count its activations")
    layer = model.get_decoder().layers[0]
    heads = _size(name, text, "num_attention_heads")
    hidden, patch = _size(name, text, "hidden_size"), _size(name, vision, "patch_size")
    width = _size(name, vision, "embed_dim", "hidden_size")
    rotates = any("rotary" in part for part, _ in model.get_encoder(modality="image").named_modules())
    return ModelShapes(
        hidden=hidden,
        layers=_size(name, text, "num_hidden_layers"),
        intermediate=_size(name, text, "intermediate_size"),
        heads=heads,
        key_heads=_first(text, "num_key_value_heads") or heads,
        head_dim=_first(text, "head_dim") or hidden // heads,
        vocabulary=_size(name, text, "vocab_size"),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        weights=sum(weight.numel() for weight in model.parameters()),
        layer_weights=sum(weight.numel() for weight in layer.parameters()),
        linear=tuple((part.in_features, part.out_features) for part in layer.modules() if isinstance(part, nn.Linear)),
        vision_hidden=width,
        vision_layers=_size(name, vision, "depth", "num_hidden_layers"),
        vision_intermediate=int(_first(vision, "intermediate_size") or width * _size(name, vision, "mlp_ratio")),
        vision_heads=_size(name, vision, "num_heads", "num_attention_heads"),
        vision_rotates=rotates,
        patches_per_token=_patches_per_token(config, vision),
        patch_values=(_first(vision, "in_channels", "num_channels") or 3)
        * (_first(vision, "temporal_patch_size") or 1)
        * patch**2,
    )


def _check_layers(name: str, config: Any) -> None:
    """Raise UserError for more layers than any model has: each is built to find the sizes."""
    for field, value in config.items():
        if isinstance(value, dict):
            _check_layers(name, value)
        elif field in LAYER_FIELDS and isinstance(value, int | float) and not value <= MAX_LAYERS:
            raise UserError(f"model: {name}'s config.json has {field} = {value:g}; the limit is {MAX_LAYERS}")


def _patches_per_token(config: Any, vision: Any) -> int:
    """Some families give a side in patches, others the factor that scales a side."""
    if shrink := _first(config, "downsample_ratio"):
        return round(1 / shrink**2)
    return prod([_first(vision, "spatial_merge_size") or _first(config, "scale_factor") or 1] * 2)


def _size(name: str, config: Any, *fields: str) -> int:
    """The first of the fields that the configuration has. Raises UserError if it has none."""
    value = _first(config, *fields)
    if not value:
        raise UserError(f"model: the {config.model_type} part of {name}'s configuration has no `{fields[-1]}`")
    return value


def _first(config: Any, *fields: str) -> Any:
    """The first of the fields with a number; the height of a (height, width) pair."""
    for field in fields:
        value = getattr(config, field, None)
        if value:
            return value[0] if isinstance(value, list | tuple) else value
    return None
