"""A policy's scores of responses under the image and its views: the inputs of scores, selectors and sinks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ResponseScores:
    """A policy's scores of B responses of T tokens (V: vocabulary, H: width), at the sampling temperature.

    Attributes:
        logps: log-probability of each response token, [B, T], nats.
        entropies: entropy of the next-token distribution that each response token was drawn from, [B, T], nats.
        logits: that distribution's logits, [B, T, V], or None where the scorer does not keep them.
        aux_loss: load-balancing loss of a mixture-of-experts model, scalar, or None.
        hidden_states: the head's inputs, [B, T, H], where a score or a sink needs them.
        exact: for a view its exact divergences from the policy under the image, by name; for the image the entropy of
            the nucleus as "nucleus_entropy"; [B, T], nats, where needed.
        similarities: cosines of each token's hidden states with those of the image tokens, by the name of
            `cppo.perception.SIMILARITIES`, [B, T], where needed; without gradient.
    """

    logps: Tensor
    entropies: Tensor
    logits: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: Tensor | None = None
    exact: Mapping[str, Tensor] = field(default_factory=dict)
    similarities: Mapping[str, Tensor] = field(default_factory=dict)

    def pick(self, rows: list[int] | slice) -> "ResponseScores":
        """The scores of these rows, with the auxiliary loss of all rows."""
        return self._each(lambda values: values[rows], self.aux_loss)

    def detached(self) -> "ResponseScores":
        """The same scores without gradients and without the auxiliary loss."""
        return self._each(Tensor.detach, None)

    def _each(self, change: Callable[[Tensor], Tensor], aux_loss: Tensor | None) -> "ResponseScores":
        logits, hidden = (None if one is None else change(one) for one in (self.logits, self.hidden_states))
        exact, similarities = (
            {name: change(values) for name, values in named.items()} for named in (self.exact, self.similarities)
        )
        return ResponseScores(change(self.logps), change(self.entropies), logits, aux_loss, hidden, exact, similarities)


@dataclass(frozen=True)
class ViewScores:
    """The policy's scores of n rollouts under the image and its views: the inputs of detection and loss.

    Attributes:
        anchor, removing, preserving: scores under the image, I- and I+; None for a view that the method does not use.
            Scores under I+ matter only at the selected tokens, unless their entropy has a weight or the dependency
            score uses them.
        response_mask: [n, T].
        draws: uniform random numbers, [n, T], for a random selection.
        score: the dependency score, [n, T], where known; NaN where a view that it compares is not scored.
        token_mask: the perception tokens, bool [n, T], once selected.
        token_weights: their weights, [n, T], 0 outside, where the selector gives weights.
        d_preserving, d_removing: exact divergences of the anchor from each view, [n, T], where known; needed at the
            selected tokens.
        advantages: per rollout, [n], or per token, [n, T], where a loss term needs them.
        old_logps, reference_logps: log-probabilities of the tokens under the policy that made the rollouts and under
            the reference, [n, T], nats, without gradient, where a loss term needs them.
    """

    anchor: ResponseScores
    removing: ResponseScores | None
    preserving: ResponseScores | None
    response_mask: Tensor
    draws: Tensor | None = None
    score: Tensor | None = None
    token_mask: Tensor | None = None
    token_weights: Tensor | None = None
    d_preserving: Tensor | None = None
    d_removing: Tensor | None = None
    advantages: Tensor | None = None
    old_logps: Tensor | None = None
    reference_logps: Tensor | None = None
