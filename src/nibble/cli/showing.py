"""Lists for a person: recipes, their fields, and what this machine has."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from nibble.errors import PlacementError


def show_recipes() -> None:
    """The built-in recipes, a line each."""
    from nibble.spec import recipes

    table = Table("recipe", "what it is for", box=None, header_style="bold")
    for name in recipes.names():
        table.add_row(name, recipes.summary(name))
    Console().print(table)
    typer.echo("\nPrint one: nibble recipes NAME. Run one: nibble train NAME model.path=... ")


def show_recipe(name: str) -> None:
    """The text of one, ready to be redirected into a file."""
    from nibble.spec import recipes

    typer.echo(recipes.text(name), nl=False)


def show_fields() -> None:
    """Every word of a recipe with type, default and meaning."""
    from nibble.spec import recipes

    for row in recipes.fields():
        typer.echo(f"{row.path}: {row.type_text} = {row.default}\n    {row.doc}")


def show_doctor() -> None:
    """Findings, worst last; fails when something would."""
    from nibble.use.doctor import examine

    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
    table = Table("", "what", "found", "what to do", box=None, header_style="bold")
    findings = sorted(examine(), key=lambda finding: list(marks).index(finding.status))
    for finding in findings:
        table.add_row(marks[finding.status], finding.name, finding.text, finding.advice)
    Console().print(table)
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if failed:
        raise PlacementError(f"nibble cannot run here: {', '.join(failed)}")
