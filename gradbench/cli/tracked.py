"""`gradbench sync` and `gradbench ui`."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

Uri = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="An MLflow store. Default: as `gradbench run` uses."),
]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]


def sync(tracking_uri: Uri = None, debug: Debug = False) -> None:
    """Send the runs that the tracking store does not have."""
    from gradbench.tracking import mirror, store_uri, unsent

    uri = store_uri(tracking_uri)
    count = 0
    for folder in unsent(uri):
        mirror(folder, uri)
        print(f"sent {folder.path}", file=sys.stderr)
        count += 1
    print(f"{count} runs sent to {uri}" if count else f"{uri} has every run already")


def ui(
    tracking_uri: Uri = None,
    port: Annotated[int, typer.Option(help="On this machine.", min=1, max=65535)] = 5000,
    debug: Debug = False,
) -> None:
    """Open MLflow on the tracked runs, until Ctrl-C."""
    from gradbench.tracking import quiet_environment, store_uri

    uri = store_uri(tracking_uri)
    print(f"MLflow on {uri}: http://127.0.0.1:{port} (Ctrl-C ends it)", file=sys.stderr)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    raise typer.Exit(subprocess.run(command, env=quiet_environment(), check=False).returncode)
