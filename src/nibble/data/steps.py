"""The loader of a recipe, and how long its run is: from rows, or from a stream.

train.max_steps, else train.max_tokens in whole steps, else train.epochs of the rows
"""

from __future__ import annotations

from nibble.data.loader import Loader
from nibble.data.splits import Splits
from nibble.data.stream import StreamLoader
from nibble.spec.config import Data, Train


def make_loader(
    splits: Splits, data: Data, train: Train, *, rank: int, world: int, pad_id: int
) -> Loader | StreamLoader:
    """Steps for one of `world` processes, from the beginning of the data."""
    if splits.stream is not None:
        return StreamLoader(
            splits.stream,
            micro_batch_size=train.micro_batch_size,
            accumulation=train.gradient_accumulation_steps,
            seed=train.seed,
            rank=rank,
            world=world,
            shuffle=data.shuffle,
        )
    return Loader(
        splits.train,
        micro_batch_size=train.micro_batch_size,
        accumulation=train.gradient_accumulation_steps,
        seed=train.seed,
        rank=rank,
        world=world,
        packing=data.packing,
        max_length=data.max_length,
        pad_id=pad_id,
        shuffle=data.shuffle,
    )


def num_steps(loader: Loader | StreamLoader, train: Train) -> tuple[int, float]:
    """Steps of the run, and steps of one pass over the data: of a stream, which has no known
    length, those of the run."""
    if isinstance(loader, StreamLoader):
        tokens = train.max_tokens or 1
        steps = train.max_steps or loader.steps_of_tokens(tokens)
        return steps, float(steps)
    if train.max_steps is not None:
        steps = train.max_steps
    elif train.max_tokens is not None:
        steps = loader.steps_of_tokens(train.max_tokens)
    else:
        steps = loader.total_steps(train.epochs)
    return steps, float(loader.steps_per_epoch)
