"""Checkpoints, read one tensor at a time and written so that a half file is never left."""

from nibble.weights.files import (
    Shape,
    check_free_space,
    write_json_atomic,
    write_safetensors_atomic,
    write_sharded,
)
from nibble.weights.source import Entry, Source
from nibble.weights.stream import LoadReport, Stream, open_weights, stream

__all__ = [
    "Entry",
    "LoadReport",
    "Shape",
    "Source",
    "Stream",
    "check_free_space",
    "open_weights",
    "stream",
    "write_json_atomic",
    "write_safetensors_atomic",
    "write_sharded",
]
