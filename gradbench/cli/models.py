"""`gradbench predict` and `gradbench export-model`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gradbench.errors import FieldError

Run = Annotated[str, typer.Argument(help="A run id, the beginning of one, or a run folder.")]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]


def predict(
    run: Run,
    files: Annotated[list[Path], typer.Argument(help="Files as the task reads them.")],
    out: Annotated[Path | None, typer.Option(help="A CSV file. Default: stdout.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    debug: Debug = False,
) -> None:
    """Predict for files with the model of a run, as CSV."""
    from gradbench.trained import predict as predict_files

    table = predict_files(run, files, device)
    if out is None:
        table.to_csv(sys.stdout, index=False)
        return
    from gradbench.files import replacing

    with replacing(out) as temporary:
        table.to_csv(temporary, index=False)
    print(f"{len(table)} predictions in {out}", file=sys.stderr)


def export_model(
    run: Run,
    form: Annotated[str, typer.Option("--format", help="safetensors.")] = "safetensors",
    part: Annotated[str, typer.Option(help="model, or backbone under its own names.")] = "model",
    out: Annotated[Path | None, typer.Option(help="Default: RUN.safetensors here.")] = None,
    debug: Debug = False,
) -> None:
    """Write the weights of a run into one file."""
    if form != "safetensors":
        raise FieldError(f"Expected --format safetensors, found {form!r}.")
    if part not in ("model", "backbone"):
        raise FieldError(f"Expected --part model or backbone, found {part!r}.")
    from gradbench.trained import export

    path = out or Path(f"{Path(run).name}.safetensors")
    export(run, path, "backbone" if part == "backbone" else "model")
    print(path)
