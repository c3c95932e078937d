"""From files to batches.

sources, hub    files and hub data sets  -> records with a line number
formats         records                  -> examples
chat, encode    examples                 -> tokens, and which of them are learnt
tokenise, cache one source               -> rows, kept on disk by content
prepare         the recipe's data        -> Splits
pack, loader    rows                     -> steps of micro-batches
documents,      texts that are read while training
stream                                   -> steps of micro-batches
steps           the recipe               -> a loader, and how many steps
"""

from nibble.data.chat import chat_template
from nibble.data.loader import Loader, one_pass
from nibble.data.pack import IGNORE, Batch
from nibble.data.report import DataReport
from nibble.data.rows import Row, Rows, show_row
from nibble.data.splits import EvalRecord, EvalRecords, Splits, prepare
from nibble.data.steps import make_loader, num_steps
from nibble.data.stream import StreamLoader, TextStream

__all__ = [
    "IGNORE",
    "Batch",
    "DataReport",
    "EvalRecord",
    "EvalRecords",
    "Loader",
    "Row",
    "Rows",
    "Splits",
    "StreamLoader",
    "TextStream",
    "chat_template",
    "make_loader",
    "num_steps",
    "one_pass",
    "prepare",
    "show_row",
]
