"""Cosines of response and image tokens, computed by hooks during a pass, one layer's hidden states at a time."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cppo.perception import Owners, cosine_to_mean, mean_cosine, of_the_tokens_themselves
from cppo.policy.packing import PackedBatch, PackedRow


@dataclass(frozen=True)
class TokenPlaces:
    """Indices of the prompts' and responses' tokens among the hidden states of a pass, flattened to [N, H].

    Attributes:
        prompts: indices of the prompts' tokens, [m] or a slice.
        responses: indices that predict the response tokens, [n].
        owners: the prompt of each token.
    """

    prompts: Tensor | slice
    responses: Tensor
    owners: Owners

    @classmethod
    def of_rows(cls, model: Any, input_ids: Tensor, num_response_tokens: int) -> "TokenPlaces":
        """For rows of prompt and response, [B, P + T]; every position of a row counts, padding too."""
        rows, length = input_ids.shape
        places = torch.arange(rows * length, device=input_ids.device).view(rows, length)
        owner = torch.arange(rows, device=input_ids.device)[:, None].expand(rows, length)
        end = length - num_response_tokens
        responses, prompts = places[:, end - 1 : -1].flatten(), places[:, :end].flatten()
        images = is_image(model, input_ids[:, :end].flatten())
        owners = Owners(owner[:, :end].flatten(), images, owner[:, end - 1 : -1].flatten(), rows)
        return cls(prompts, responses, owners)

    @classmethod
    def of_packed(cls, model: Any, row: PackedRow) -> "TokenPlaces":
        """For a packed row."""
        layout, device = row.layout, row.input_ids.device
        pieces = torch.cat([torch.arange(len(layout.prompts), device=device), layout.prompt_of_segment])
        lengths = layout.cu_seqlens_q.diff()
        owner = pieces.repeat_interleave(lengths, output_size=row.input_ids.shape[1])
        places = torch.arange(row.input_ids.shape[1], device=device)
        responses = row.scored_tokens(places[None, :, None]).squeeze(-1)
        end = layout.num_prompt_tokens
        images = is_image(model, row.input_ids[0, :end])
        return cls(slice(end), responses, Owners(owner[:end], images, owner[responses], len(layout.prompts)))


def is_image(model: Any, input_ids: Tensor) -> Tensor:
    """1 for image tokens, else 0."""
    known = [getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")]
    ids = [value for value in known if isinstance(value, int)]
    return torch.isin(input_ids, torch.tensor(ids, dtype=input_ids.dtype, device=input_ids.device))


@dataclass
class Similarities:
    """The cosines of the passes inside the context `similarities`, by name of `SIMILARITIES`.

    Attributes:
        names: the cosines to compute.
        passes: the tokens of each pass, in order.
        layers: number of layers of the text part.
        sums: for each pass and name, values [n] that add up over the layers.
    """

    names: Collection[str]
    passes: Sequence[TokenPlaces]
    layers: int
    sums: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = [{} for _ in self.passes]

    def add(self, number: int, hidden: Tensor, last: bool) -> None:
        """Add the hidden states of a layer in the pass of this number."""
        places, found = self.passes[number], self.sums[number]
        flat = hidden.detach().flatten(0, -2)
        prompts, responses = flat[places.prompts], flat[places.responses]
        if "all_layers" in self.names:
            part = mean_cosine(prompts, responses, places.owners) / self.layers
            found["all_layers"] = found["all_layers"] + part if "all_layers" in found else part
        if last and "last_layer" in self.names:
            found["last_layer"] = cosine_to_mean(prompts, responses, places.owners)

    def of_rows(self, attention_mask: Tensor, num_response_tokens: int) -> dict[str, Tensor]:
        """For the response tokens of plain rows, [B, T]."""
        attended = attention_mask[:, -num_response_tokens:]
        return {
            name: of_the_tokens_themselves(values.view(attended.shape), attended)
            for name, values in self.sums[0].items()
        }

    def of_view(self, batch: PackedBatch, view: str) -> dict[str, Tensor]:
        """For a view's response tokens in a packed batch, [B, T]; 0 where it has none."""
        part, found = batch.tokens[view], {}
        for name in self.names:
            values = torch.cat([sums[name] for sums in self.sums])[part]
            attended = batch.unpack(part, torch.ones_like(values))
            found[name] = of_the_tokens_themselves(batch.unpack(part, values), attended) * attended
        return found


@contextmanager
def similarities(model: Any, names: Collection[str], passes: Sequence[TokenPlaces]) -> Iterator[Similarities]:
    """Context: the passes of the model record their cosines.

    Hidden states are those after each layer of the text part; those after the last layer are normalized as for the
    head.

    Args:
        model: a transformers vision-language model without wrappers; it runs these passes in order.
        names: of `SIMILARITIES`, at least one.
    """
    layers = list(model.get_decoder().layers)
    found = Similarities(names, passes, len(layers))

    def take(last: bool) -> Any:
        numbers = iter(range(len(passes)))

        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            hidden = output.last_hidden_state if last else output[0] if isinstance(output, tuple) else output
            found.add(next(numbers), hidden, last)

        return hook

    with ExitStack() as hooks:
        for layer in layers[:-1] if "all_layers" in names else ():
            hooks.callback(layer.register_forward_hook(take(False)).remove)
        hooks.callback(model.get_decoder().register_forward_hook(take(True)).remove)
        yield found


def packed_similarities(model: Any, names: Collection[str], batch: PackedBatch) -> AbstractContextManager[Similarities]:
    """`similarities` for the passes of a packed batch."""
    return similarities(model, names, [TokenPlaces.of_packed(model, row) for row in batch.passes])
