"""Write a small data set in ViRL39K's layout: a table with image paths, and the images in an archive beside it.

    python examples/virl39k_stand_in.py ViRL39K
    cppo train --config cppo-paper --data hub:./ViRL39K:train --columns virl39k --dry_run

The questions are those of the task family `digits`. One row in twelve has two images, one in twelve an image of 20 x 20
pixels.
"""

import sys
import zipfile
from pathlib import Path

from datasets import Dataset

from cppo.data import load_records


def main(folder: Path, rows: int) -> None:
    folder.mkdir()
    table = []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number, record in enumerate(load_records(f"tasks:digits?n={rows}")):
            image = record.images[0].resize((20, 20)) if number % 12 == 1 else record.images[0]
            names = [f"images/{number}-{place}.png" for place in range(2 if number % 12 == 0 else 1)]
            for name in names:
                with archive.open(name, "w") as file:
                    image.save(file, "PNG")
            question = f"{'<image>' * len(names)}{record.prompt}"
            table.append({"question": question, "answer": f"\\boxed{{{record.answer}}}", "qid": number, "image": names})
    Dataset.from_list(table).to_parquet(folder / "39Krelease.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]), rows=int(sys.argv[2]) if len(sys.argv) > 2 else 96)
