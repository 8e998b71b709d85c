"""`cppo methods [NAME]`: the methods that `cppo train --method` takes, or all that one of them sets."""

from collections.abc import Sequence

from cppo.cli.console import option_text
from cppo.cli.parser import Parser
from cppo.methods import METHODS, get_method


def run(argv: Sequence[str]) -> None:
    """Print the table of methods, or one method. Raises UserError for an unknown name."""
    parser = Parser(prog="cppo methods", description="Methods for `cppo train --method NAME`.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="show what it is, and every option that it sets")
    name = parser.parse_all(argv).name
    if name is None:
        width = max(map(len, METHODS))
        for method in METHODS.values():
            print(f"{method.name:<{width}}  {method.summary}")
        return
    method = get_method(name)
    print(method.text)
    print()
    for option, value in method.options.items():
        print(f"{option}: {option_text(value)}")
    if method.rewards:
        print(f"rewards: {', '.join(f'{name} x {weight:g}' for name, weight in method.rewards.items())}")
