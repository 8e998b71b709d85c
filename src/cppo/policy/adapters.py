"""LoRA adapters of a model whose output layer is tied to its embedding: one weight, of which they change one use."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cppo.policy.families import unwrapped


def adapts_tied_weights(model: Any) -> bool:
    """Whether an adapter lies on the embedding or the output layer, and both share their weight."""
    model = unwrapped(model)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    plain = [_plain(end) for end in ends]
    shared = plain[1] is not None and plain[0].weight is plain[1].weight
    return shared and any(one is not end for one, end in zip(plain, ends, strict=True))


def merged(model: Any) -> Any:
    """The transformers model of a PEFT model with the adapter merged in.

    Where the adapter lies on a weight that embedding and output layer share, they get a weight each: merged into the
    shared one, it would change both. The configuration then says that they are not tied.
    """
    if adapts_tied_weights(model):
        base = unwrapped(model)
        head = _plain(base.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    return model.merge_and_unload()


def _plain(layer: Any) -> Any:
    """The layer itself, without an adapter around it."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
