"""Choose and sort rows by their ratings from `cppo data rate`."""

from cppo.data import Rating, RecordSource, ratings_of
from cppo.errors import UserError, tell
from cppo.options import TrainOptions
from cppo.recipes import Recipe


def choose_rated(source: RecordSource, options: TrainOptions, stages: int) -> tuple[RecordSource, int]:
    """The rows to train on, in order, and the number of rows left out; without `data_ratings` all rows.

    Rows outside a band are left out. With several stages, rows are sorted from low to high entropy.

    Raises UserError if a row has no rating, no row is left, or nothing uses the ratings.
    """
    if options.data_ratings is None:
        return source, 0
    given = _bands(options)
    if not given and stages == 1:
        raise UserError(
            "data_ratings: nothing uses the ratings: set data_stages above 1, data_confidence_band or "
            "data_accuracy_band, or leave data_ratings out"
        )
    ratings = ratings_of(source, options.data_ratings)
    kept = [
        index
        for index, rating in enumerate(ratings)
        if all(low <= getattr(rating, name) <= high for name, (low, high) in given.items())
    ]
    bounds = _bounds(given)
    if not kept:
        raise UserError(f"{source.name}: no row has {bounds}; {_spread(ratings, list(given))}")
    if given:
        left_out = len(source) - len(kept)
        tell(f"{left_out:,} of {len(source):,} rows are left out of training; {len(kept):,} have {bounds}")
    if stages > 1:
        kept.sort(key=lambda index: getattr(ratings[index], options.data_order))
    return source.keep(kept), len(source) - len(kept)


def order_lines(recipe: Recipe) -> list[str]:
    """A line on how a run chooses and orders its rows; none without bands and stages."""
    options, stages = recipe.options, recipe.resolved["data_stages"]
    assert isinstance(options, TrainOptions)
    parts = [_bounds(_bands(options)), f"{stages} stages" if stages > 1 else ""]
    if options.data_ratings is not None:
        parts[1] += f" from low to high {options.data_order}" if stages > 1 else ""
        parts.append(f"as rated in {options.data_ratings}")
    text = ", ".join(filter(None, parts))
    return [f"order      {text}"] if text else []


def _bands(options: TrainOptions) -> dict[str, list[float]]:
    bands = {"confidence": options.data_confidence_band, "accuracy": options.data_accuracy_band}
    return {name: band for name, band in bands.items() if band is not None}


def _bounds(bands: dict[str, list[float]]) -> str:
    return " and ".join(f"{name} in {band}" for name, band in bands.items())


def _spread(ratings: list[Rating], names: list[str]) -> str:
    """The smallest and largest value of some measures, in words."""
    values = {name: [getattr(rating, name) for rating in ratings] for name in names}
    return ", ".join(f"{name} is {min(found):.3g} to {max(found):.3g}" for name, found in values.items())
