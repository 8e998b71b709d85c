"""Write the untrained micro VLM: `python -m cppo.assets OUTPUT_DIR [--seed N]`."""

import argparse

from cppo.progress import Progress


def main(arguments: list[str] | None = None) -> None:
    """Build the model and print its folder."""
    parser = argparse.ArgumentParser(prog="python -m cppo.assets", description="Write the untrained micro VLM.")
    parser.add_argument("output_dir")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with Progress(desc="build the untrained model"):
        from cppo.assets.build import build_micro  # imports torch, which can take long

        folder = build_micro(options.output_dir, options.seed)
    print(folder)


if __name__ == "__main__":
    main()
