"""`nibble export`: from a run to a folder, with the distance printed."""

from __future__ import annotations

from pathlib import Path

import typer

from nibble.cli.loading import resolve, trained_file
from nibble.cli.progress import loading_bar
from nibble.cli.quiet import quiet_libraries
from nibble.place.single import one_device
from nibble.train.int8_weights import DenseTensors
from nibble.use.assemble import assemble
from nibble.use.export import check_kind
from nibble.use.export import export as write
from nibble.use.held_out import held_out_batches
from nibble.weights.tensor_file import TensorFile

NUM_COMPARED_ROWS = 8


def export(
    path: str, *, to: str, out: Path | None, max_divergence: float | None, device: str
) -> None:
    """Export the newest checkpoint of a run."""
    quiet_libraries()
    target = resolve(path, device=device)
    file = trained_file(target)
    recipe, run = target.recipe, target.run
    check_kind(to, recipe)
    assert run is not None
    place = one_device(recipe.place)
    assembly = assemble(recipe, to_train=False)
    held_out = held_out_batches(
        recipe, assembly.tokenizer, assembly.built.family, num_rows=NUM_COMPARED_ROWS
    )
    with loading_bar(f"export {to}") as advance:
        done = write(
            recipe,
            DenseTensors(TensorFile(file)),
            kind=to,
            folder=out or run / f"export-{to}",
            batches=[place.batch(batch) for batch in held_out.batches],
            device=place.device,
            max_divergence=(
                recipe.export.max_divergence if max_divergence is None else max_divergence
            ),
            label_names=held_out.label_names,
            progress=lambda _what, done, total: advance(done, total),
        )
    distance = done.divergence
    what = "rows" if recipe.model.task == "classification" else "tokens"
    typer.echo(
        f"{done.folder}: {done.num_bytes / 2**20:,.1f} MiB\n"
        f"distance from the trained model on {distance.num_targets} {held_out.kind} {what}: "
        f"{distance.mean:.2e} nats each (largest {distance.largest:.2e}), "
        f"same best token {distance.same_best:.1%}"
    )
