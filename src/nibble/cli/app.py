"""The commands. Each one reads its words, calls one function below, and shows the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train large language models on the GPUs that people own. `--debug` shows tracebacks.",
)

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, a built-in recipe or a run folder.")
]
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run folder, an exported or any other model.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context,
    recipe: RecipeName,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last checkpoint.")] = False,
    resume_if_begun: Annotated[
        bool, typer.Option(help="The same if there is a run, else start one; for job scripts.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print plan and recipe, then stop.")] = False,
    nodes: Annotated[
        str | None, typer.Option(metavar="N", help="Machines, or LEAST:MOST at a rendezvous.")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="This machine's number, from 0.")] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 is reached.")
    ] = None,
    rendezvous: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where machines find each other.")
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start again after this many lost processes.")
    ] = 0,
) -> None:
    """Plan, load, train on all GPUs, checkpoint. Override with key=value or --key value."""
    from nibble.cli import train_recipe
    from nibble.cli.launching import Start
    from nibble.launch.meeting import read_nodes
    from nibble.spec.load import dump_recipe, load_recipe

    loaded = load_recipe(recipe, context.args)
    start = Start(
        resume=resume,
        resume_if_begun=resume_if_begun,
        nodes=read_nodes(nodes=nodes, node_rank=node_rank, master=master, rendezvous=rendezvous),
        max_restarts=max_restarts,
    )
    if dry_run:
        from nibble.cli.planning import show_plan

        typer.echo(dump_recipe(loaded))
        show_plan(loaded, as_json=False)
        return
    train_recipe(loaded, start=start)


@app.command(context_settings=EXTRA)
def plan(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file, a built-in recipe or a run folder."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Plan for this card, such as rtx4090; default: this machine's."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many of them share the run.")] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Choose the fastest that fits, say why, and write it.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id, with or without a recipe.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Built-in recipe to fit when none is named; default qlora.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the fitted recipe goes; default fitted.yaml.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A row for each method: memory, speed, cost, quality."),
    ] = None,
    ram: Annotated[str | None, typer.Option(help="Host memory to be had, such as 64GiB.")] = None,
    tokens: Annotated[int | None, typer.Option(min=8, help="Tokens in a row.")] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Measure this machine and write its row of hardware.toml.")
    ] = False,
    json: Annotated[bool, typer.Option(help="For programs.")] = False,
) -> None:
    """Bytes by category and phase, and tokens per second, before anything is loaded."""
    words = list(context.args)
    if recipe is not None and "=" in recipe:
        words.insert(0, recipe)
        recipe = None
    if calibrate:
        from nibble.cli.calibrating import run as measure

        measure(as_json=json)
        return
    if compare is not None:
        from nibble.cli.comparing import show_comparison

        show_comparison(
            compare, words, as_json=json, gpu=gpu, gpus=gpus, ram=ram, row_tokens=tokens
        )
        return
    if recipe is None and model is None and not any(w.startswith("model") for w in words):
        raise typer.BadParameter("name a RECIPE (nibble recipes), --model or --compare MODEL")
    from nibble.cli.fitting import OUT, recipe_to_fit, show_fit
    from nibble.cli.planning import show_plan

    loaded = recipe_to_fit(
        recipe, words, fit=fit, model=model, method=method, ram=ram, tokens=tokens
    )
    if fit or out is not None:
        show_fit(loaded, as_json=json, gpu=gpu, gpus=gpus, out=out or OUT)
    else:
        show_plan(loaded, as_json=json, gpu=gpu, gpus=gpus)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    fields: Annotated[bool, typer.Option(help="Every word of a recipe, with its meaning.")] = False,
) -> None:
    """List the built-in recipes, or print one."""
    from nibble.cli.showing import show_fields, show_recipe, show_recipes

    if fields:
        show_fields()
    elif name is None:
        show_recipes()
    else:
        show_recipe(name)


@app.command()
def chat(
    model: RunOrModel,
    prompt: Annotated[str | None, typer.Option(help="Ask one question and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default 512, or half of a shorter context.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")
    ] = None,
    base: Annotated[bool, typer.Option(help="Ask the model as it was before the run.")] = False,
    device: Device = "auto",
) -> None:
    """Talk to a model. Keeps the conversation; drops the oldest turns when the context is full."""
    from nibble.cli.chatting import chat as run
    from nibble.cli.chatting import sampling

    run(
        model,
        prompt=prompt,
        system=system,
        how=sampling(temperature=temperature, top_p=top_p, seed=seed, stop=stop or ()),
        max_new_tokens=max_new_tokens,
        base=base,
        device=device,
    )


@app.command("eval")
def evaluate(
    model: RunOrModel,
    text: Annotated[Path | None, typer.Option(help="Perplexity on this text file.")] = None,
    data: Annotated[str | None, typer.Option(help="Loss on this data set.")] = None,
    context_length: Annotated[int | None, typer.Option(min=8)] = None,
    rouge: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also answer N rows and give ROUGE.")
    ] = None,
    num_rows: Annotated[int | None, typer.Option(min=1, help="At most this many rows.")] = None,
    base: Annotated[bool, typer.Option(help="The model as it was before the run.")] = False,
    device: Device = "auto",
    json: Annotated[bool, typer.Option(help="For programs.")] = False,
) -> None:
    """Perplexity on a text, loss on a set, metrics of a classification task."""
    from nibble.cli.evaluating import evaluate as run

    run(
        model,
        text=text,
        data=data,
        context_length=context_length,
        num_rouge_rows=rouge,
        num_rows=num_rows,
        base=base,
        device=device,
        as_json=json,
    )


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[str, typer.Option(help="adapter, merged or hf.")] = "merged",
    out: Annotated[Path | None, typer.Option(help="Folder (default RUN/export-KIND).")] = None,
    max_divergence: Annotated[
        float | None, typer.Option(min=0.0, help="Refuse above this KL, in nats a token.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Write a folder that other tools load, and measure how far it is from the trained model."""
    from nibble.cli.exporting import export as write

    write(run, to=to, out=out, max_divergence=max_divergence, device=device)


@app.command()
def doctor() -> None:
    """What this machine has, and what would fail on it."""
    from nibble.cli.showing import show_doctor

    show_doctor()


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where it writes.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 40,
) -> None:
    """Fine-tune SmolLM2-135M-Instruct on Python's own documentation, from here to a chat."""
    from nibble.cli.demo import run

    run(folder=folder, num_steps=steps)


@app.command()
def version() -> None:
    """The version of nibble."""
    from nibble import __version__

    typer.echo(__version__)
