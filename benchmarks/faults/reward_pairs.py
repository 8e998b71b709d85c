"""Number of pairs of tests/rewards/pairs.tsv that the accuracy reward judges right.

`python benchmarks/faults/reward_pairs.py`

Prints the figures of docs/results/reliability.md, a row for each kind: pairs, judged right, false positives, false
negatives.
"""

from pathlib import Path

from cppo.rewards import get_accuracy_reward

TABLE = Path(__file__).parents[2] / "tests" / "rewards" / "pairs.tsv"


def main() -> None:
    kind, totals, kinds = "", [0, 0, 0, 0], {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## ") and "\t" not in line:
            kind = line.removeprefix("## ")
            kinds[kind] = [0, 0, 0, 0]
        elif line and not line.startswith("# "):
            expected, given, verdict, *choices = line.split("\t")
            text = given if kind.endswith(": responses") else rf"<think>so</think> \boxed{{{given}}}"
            reward = get_accuracy_reward(0.01 if kind.endswith(": tolerant") else 0.0)
            found = reward([text], answer=[expected.replace(r"\n#", "\n#")], choices=[choices or None])[0] == 1.0
            right = verdict == "right"
            for place, counted in enumerate((True, found == right, found and not right, right and not found)):
                kinds[kind][place] += counted
                totals[place] += counted
    for name, counts in {**kinds, "all": totals}.items():
        print(f"| {name.partition(': ')[0]} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    main()
