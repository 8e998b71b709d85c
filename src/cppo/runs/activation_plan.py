"""Peak memory of a micro-batch's forward and backward pass beside weights and their gradients, by arithmetic.

The terms follow the tensors that transformers' layers keep for the backward pass, including small ones. The letters h,
q and i are widths of a token: hidden states, queries, the inside of the MLP. The letters e and f are widths of a patch:
hidden states, the inside of the vision tower's MLP. Layers of other families count as Qwen2.5-VL's.
"""

from dataclasses import dataclass
from math import ceil

from cppo.runs.memory_work import FULL, HALF, INDEX, Way, Work
from cppo.runs.model_shapes import ModelShapes

HEAD_TOKENS, HEAD_VOCABULARY = 4096, 8192
"""The tile of logits that TRL's kernel computes at a time: its tokens, and the vocabulary of `cppo.policy.packed`."""


@dataclass(frozen=True)
class Counts:
    """Sizes of a micro-batch; all but `passes`, `graphs` and `together` are for one pass.

    Attributes:
        passes: the image and each view.
        graphs: number of passes with a backward pass.
        together: number of passes with activations at the same time.
        prompts: tokens of prompts.
        tokens: of prompts and responses.
        keys: seen by queries; a prompt's count again for each of its responses.
        scored: response tokens.
        patches: of images.
    """

    passes: int
    graphs: int
    together: int
    prompts: int
    tokens: int
    keys: int
    scored: int
    patches: int

    @classmethod
    def of(cls, shapes: ModelShapes, way: Way, work: Work) -> "Counts":
        packed = work.shared and way.packs
        passes = 1 + work.views
        graphs = passes if work.view_gradients else 1
        rows = ceil(work.micro_batch / work.num_generations) if packed else work.micro_batch
        prompts = rows * (work.prompt_tokens - packed)  # a packed prompt's last token comes before each response
        scored = work.micro_batch * work.response_tokens
        tokens = prompts + scored
        keys = tokens + packed * work.micro_batch * (work.prompt_tokens - 1)
        patches = rows * work.image_tokens * shapes.patches_per_token
        return cls(passes, graphs, 1 if work.sequential else graphs, prompts, tokens, keys, scored, patches)


def activations(shapes: ModelShapes, way: Way, work: Work) -> int:
    """Peak of a micro-batch, in bytes.

    The peak is in the head, in the last decoder layer or in the last block of the vision tower, each with the tensors
    that earlier layers keep.
    """
    of = Counts.of(shapes, way, work)
    stream = of.together * of.tokens * way.stream * shapes.hidden
    indices, angles = of.together * _indices(way, of), of.together * of.tokens * 2 * way.stream * shapes.head_dim
    ends = stream if way.adapter else 0  # embeddings, where an adapter's gradients end
    tower, projector, block = _tower(shapes, way, work, of)
    layer, live = _layer(shapes, way, work, of)
    kept = shapes.layers * (stream if work.checkpointing else layer)
    # A tied weight's gradient waits for the embedding's; with sharded weights, for the end of the pass.
    waiting = _head_gradient(shapes, way) if shapes.tied or way.shards else 0
    if work.sequential and of.graphs > 1:
        waiting += _other_passes(shapes, way, work, of, indices + angles + ends)
    in_layer = waiting + live - (0 if work.checkpointing else layer)
    in_views = (of.passes - of.graphs) * of.tokens * forward_width(shapes, way)
    in_text = angles + ends + projector + kept + max(_head(shapes, way, of), in_layer, in_views)
    return indices + tower + max(in_text, waiting + stream + block)


def forward_width(shapes: ModelShapes, way: Way) -> int:
    """Bytes of a token in a layer that keeps nothing: the stream twice, a norm's output, three widths of the MLP."""
    return (2 * way.stream + HALF) * shapes.hidden + HALF * 3 * shapes.intermediate


def lora_weights(shapes: ModelShapes, rank: int) -> int:
    """Number of weights of an adapter on the linear layers of the decoder."""
    return shapes.layers * rank * sum(inputs + outputs for inputs, outputs in shapes.linear)


def _indices(way: Way, of: Counts) -> int:
    """Bytes for the places of a pass's prompts, responses and keys in its row, its image tokens, and token ids."""
    ids = 0 if way.adapter else INDEX * of.tokens
    return INDEX * (of.prompts + of.scored + of.keys) + of.prompts + of.tokens + ids


def _inputs(shapes: ModelShapes, way: Way, of: Counts) -> int:
    """Bytes of a pass until its forward is over, beside `_indices`: positions, images, and an adapter's token ids."""
    numbers = INDEX * of.tokens * (4 if way.adapter else 3)
    return numbers + FULL * of.patches * shapes.patch_values


def _other_passes(shapes: ModelShapes, way: Way, work: Work, of: Counts, row: int) -> int:
    """Bytes that sequential passes hold beside the current backward pass: in the first pass or, if more, in the second.

    From the second pass on, earlier gradients wait for the last pass. row: bytes that each keeps of its row.
    """
    states = of.passes * of.scored * shapes.hidden * way.stream  # gradients of all passes' states
    trained = lora_weights(shapes, work.lora_r) if way.adapter else shapes.weights - shapes.head_weights
    gradients, each = (FULL if way.adapter else way.stream) * trained, row + _inputs(shapes, way, of)
    return states + of.graphs * each - row + max(0, gradients - each)


def _layer(shapes: ModelShapes, way: Way, work: Work, of: Counts) -> tuple[int, int]:
    """Bytes that a decoder layer keeps, and the peak of its backward pass.

    The peak is where the MLP's product goes backward: its gradient and those of its two factors exist, the product is
    freed. With few tokens it is just before, with the gradient of the last weight. With an adapter it is earlier, where
    the MLP's last adapter is computed again.
    """
    h, q, i = shapes.hidden, shapes.heads * shapes.head_dim, shapes.intermediate
    tokens = of.together * of.tokens
    keys = of.together * of.keys * 2 * HALF * shapes.key_heads * shapes.head_dim
    attention = HALF * 2 * q + FULL * shapes.heads  # queries, outputs, a number a head in float32
    factors = 2 * FULL  # of both norms
    if way.adapter:
        # Frozen layers keep no inputs, but each adapter keeps its own copy; norms keep theirs in float32.
        copies = sum(HALF * (inputs + work.lora_r) for inputs, _ in shapes.linear)
        widths = factors + 2 * FULL * h + attention + copies + HALF * 3 * i  # gate, activated gate, up
        kept = tokens * widths + keys + HALF * lora_weights(shapes, work.lora_r) // shapes.layers  # autocast's copies
        # The product and its copy in float32. The MLP's input and residual, the frozen layer's result, and twice the
        # gradient.
        return kept, kept + tokens * ((HALF + FULL) * i + HALF * 5 * h)
    # Norms keep their input in float32, the normalised and the scaled one. With a float32 stream the first input is
    # kept anyway, and each of the five linear layers keeps a cast of the scaled one.
    norms = 2 * (FULL + HALF + HALF) * h if way.stream == HALF else (3 * FULL + 5 * HALF) * h
    widths = factors + norms + attention + HALF * 4 * i  # gate, activated gate, up, product
    casts = HALF * sum(inputs * outputs for inputs, outputs in shapes.linear) if way.stream == FULL else 0
    last = HALF * h * i
    kept = tokens * widths + keys + casts
    of_factors = tokens * HALF * 2 * i - (last if casts else 0)
    of_weight = tokens * HALF * (i + (h if casts else 0)) + last
    return kept, kept + tokens * way.stream * h + max(of_factors, of_weight)


def _head_gradient(shapes: ModelShapes, way: Way) -> int:
    return 0 if way.adapter else way.stream * shapes.head_weights


def _head(shapes: ModelShapes, way: Way, of: Counts) -> int:
    """Peak bytes in the head beside kept tensors: in the forward pass, or in the last view's backward pass.

    Until the forward pass is over, the images of all passes count too.
    """
    h, calls, own = shapes.hidden, of.graphs, _head_gradient(shapes, way)
    norm = FULL if way.adapter else FULL + way.stream  # the last norm's input in float32, and the normalised one
    held = of.together * of.tokens * (norm * h + FULL) + of.passes * of.scored * (h * way.stream + INDEX)
    held += FULL * of.scored * 2 * calls  # two numbers of each token from the forward pass
    tile = min(of.scored, HEAD_TOKENS)
    held += HALF * HEAD_VOCABULARY * tile
    if way.stream == FULL:  # casts of a tile's states and weights
        held += HALF * h * (tile + min(HEAD_VOCABULARY, shapes.vocabulary))
    forward = of.passes * (_inputs(shapes, way, of) + INDEX * 2 * of.scored) + FULL * 9 * of.scored
    forward += (of.passes - of.together) * _indices(way, of)
    backward = of.scored * (h * FULL + FULL)
    if calls > 1:
        backward += of.passes * of.scored * h * way.stream
    if own:
        backward += FULL * shapes.head_weights + (calls > 1) * own
    if way.stream == HALF:
        backward += of.scored * h * HALF + own
    return held + max(forward, backward)


def _tower(shapes: ModelShapes, way: Way, work: Work, of: Counts) -> tuple[int, int, int]:
    """Bytes that the vision tower keeps, bytes of its projector, and the extra peak of a block's backward pass."""
    e, f, patches = shapes.vision_hidden, shapes.vision_intermediate, of.together * of.patches
    if way.adapter:
        return 0, 0, 0
    order = INDEX * patches // shapes.patches_per_token if shapes.vision_rotates else 0  # of tokens in windows
    # The normalised patches and the scaled ones, then two layers as wide as a token's patches.
    projector = patches * 4 * HALF * e + order
    if way.stream == FULL:
        merged = e * shapes.patches_per_token
        projector += HALF * (merged * merged + merged * shapes.hidden)
    if work.frozen_tower:
        return 0, projector, 0
    projector += patches * FULL * (e + 1)  # the norm's input and its factor
    pixels = patches * shapes.patch_values * HALF + order
    if way.stream == FULL:
        pixels += HALF * e * shapes.patch_values
    rotary = patches * 2 * FULL * e // shapes.vision_heads if shapes.vision_rotates else 0  # cosines and sines
    norms, attention = 2 * ((FULL + 2 * HALF) * e + FULL), HALF * 6 * e + FULL * shapes.vision_heads
    block = patches * (norms + attention + HALF * 4 * f)
    kept = shapes.vision_layers * (patches * HALF * e if work.checkpointing else block)
    live = patches * (HALF * 2 * f + HALF * e) + (block if work.checkpointing else 0)
    return pixels + rotary + kept, projector, live
