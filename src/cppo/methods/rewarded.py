"""The published methods that rewards define: a reward pays for perception, and GRPO learns it.

A declaration's `rewards` maps the rewards to their weights. Prompts must ask for the form that the rewards check.
"""

from cppo.methods.blocks import Options
from cppo.methods.published import grpo


def vision_sr1() -> Options:
    r"""Vision-SR1 (arXiv 2508.19652), first version: a response's description alone must lead to the right answer
    again.

    Reward 0.9 accuracy + 0.1 format + 1.0 for the answer that the current policy finds from description and question,
    without the image. The base is GRPO: one advantage for all tokens. The form is `<description>`, `<think>`,
    `\boxed{}`; prompts must ask for it. In its code, a response without the tag is passed on whole, with its answer,
    and earns the reward; a description may also hold the answer. Here a missing or empty description earns nothing, nor
    does one with `\boxed` (`description?guard=none` is theirs, `answer` is stricter). The second answer is one sample
    at the rollouts' temperature, as in its code; its 512 tokens are ours. Published runs: first a supervised stage on
    9,000 rows, then G = 8, KL 0.01 to the reference, temperature 1, top-p 0.99.
    """
    return {
        **grpo(),
        "rewards": {"accuracy": 0.9, "format?before=description": 0.1, "description": 1.0},
    }


def vision_sr1_two_advantages() -> Options:
    """Vision-SR1 (arXiv 2508.19652), later version: the answers from descriptions are also trained, by their own
    reward.

    The response has the reward 0.9 accuracy + 0.1 format, the second answer has the description's reward. Each has its
    own group z-scores, log-probabilities and KL, and half of the loss. Only a note on this version is known, no code:
    weights, tags, guard and the bound of 512 tokens are those of the first version. The loss is a mean over rows, as
    many of each kind, so halves are exact. A response without a description has no second answer and does not count in
    its group's statistics.
    """
    return {
        **grpo(),
        "loss_type": "grpo",
        "trained_answers": "description_reward",
        "trained_answers_weight": 0.5,
        "rewards": {**vision_sr1()["rewards"], "description": 0.0},
    }


def visionary_r1() -> Options:
    r"""Visionary-R1 (arXiv 2505.14677): the caption before the reasoning must answer the question by itself.

    Reward accuracy + format + 0.1 for the answer that the current policy finds from caption and question, without the
    image. The policy must write a fixed refusal, which earns 0, where the text does more than describe. The form is
    `<info>`, `<think>`, and the answer: here in `\boxed{}` as for all methods, in the paper in `<answer>`. Its code
    adds the caption reward again at every loss call and does not find captions with line breaks. There, missing
    captions shift the rewards of later rollouts; here each counts once, for its rollout. Its grader depends on the kind
    of question (ANLS, ROUGE); ours compares as `accuracy` does. The words of the refusal are ours. Published runs: G =
    8, 768 tokens, at most 1e6 pixels, and a KL to the reference of 0.04 with a cosine to 0
    (`schedules: [beta=cosine]`).
    """
    caption = "description?opening=<info>&closing=</info>&refusal=not a description"
    return {
        **grpo(),
        "loss_type": "grpo",
        "beta": 0.04,
        "schedules": ["beta=cosine"],
        "rewards": {"accuracy": 1.0, "format?before=info": 1.0, caption: 0.1},
    }


def perception_r1() -> Options:
    r"""Perception-R1 (arXiv 2506.07218): a response must state the visual facts that its row lists.

    Reward 0.9 accuracy + 0.1 format + 0.7 facts stated / (facts + 1e-6) - 2 (1 - distinct / all 20-grams of words). Its
    data column `facts` holds what a text model extracted from reference traces; a row without facts has no such term.
    In its code, a judge of 32B parameters says which facts a response states, not whether they are true, and a failed
    call scores 0: `facts?judge=URL&model=NAME`. Without a judge, our default, the response must state a fact in its own
    words. Its form is `<think>` and `<answer>` with `\boxed{}` in it; here `<think>` and `\boxed{}`. Clip 0.2 / 0.3, no
    KL. Published runs: G = 8, 25 epochs over 1,442 rows. Its code does not use its weighting of 1.0 / 0.1.
    """
    return {
        **grpo(),
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "rewards": {"accuracy": 0.9, "format": 0.1, "facts": 0.7, "word_repetition?ngram_size=20": 2.0},
    }


REWARDED = {
    "perception-r1": perception_r1,
    "vision-sr1": vision_sr1,
    "vision-sr1-two-advantages": vision_sr1_two_advantages,
    "visionary-r1": visionary_r1,
}
"""These methods by name."""
