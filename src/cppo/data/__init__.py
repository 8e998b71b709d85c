"""Data: one record schema, its readers, and the check that finds bad rows before training."""

from cppo.data.check import BadRows, MissingColumns, no_row_has
from cppo.data.hub import HubAway, open_hub_table
from cppo.data.images import PixelBounds
from cppo.data.mapping import check_columns
from cppo.data.prompts import chat_messages, question_text, with_suffix
from cppo.data.ratings import Rating, ratings_of
from cppo.data.readers import load_records, load_rows
from cppo.data.record import RECORD_COLUMNS, Record, RecordSource, first_prompts, to_dataset
from cppo.data.spec import hub_dataset, parse_spec
from cppo.data.summary import DataSummary, summarize
from cppo.data.tables import Table

__all__ = [
    "RECORD_COLUMNS",
    "BadRows",
    "DataSummary",
    "HubAway",
    "MissingColumns",
    "PixelBounds",
    "Rating",
    "Record",
    "RecordSource",
    "Table",
    "chat_messages",
    "check_columns",
    "first_prompts",
    "hub_dataset",
    "load_records",
    "load_rows",
    "no_row_has",
    "open_hub_table",
    "parse_spec",
    "question_text",
    "ratings_of",
    "summarize",
    "to_dataset",
    "with_suffix",
]
