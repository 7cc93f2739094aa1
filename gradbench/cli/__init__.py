"""The command line: parse and call, nothing else."""

from __future__ import annotations

import sys
import traceback

import typer
from typer.exceptions import TyperException

from gradbench.cli import data, listings, models, runs, tracked
from gradbench.errors import GradBenchError
from gradbench.registry import foreign_distribution

INTERRUPTED = 130  # 128 + SIGINT, as shells count

app = typer.Typer(
    name="gradbench",
    help="Which way of mixing auxiliary gradients into a primary one helps, by how much, how "
    "surely, and at what cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(runs.run)
app.command("methods")(listings.methods)
app.command("tasks")(listings.tasks)
app.command("backbones")(listings.backbones)
app.command("info")(listings.info)
app.command("predict")(models.predict)
app.command("export-model")(models.export_model)
app.add_typer(data.app, name="data")
app.command("sync")(tracked.sync)
app.command("ui")(tracked.ui)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 fine, 2 yours to mend, 1 ours or a plug-in's, 130 stopped."""
    sys.exit(_status(sys.argv[1:] if arguments is None else arguments))


def _status(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        foreign = foreign_distribution()
        if foreign is not None:
            raise GradBenchError(
                f"Expected `gradbench` to be this package, found the unrelated distribution "
                f"'gradbench' {foreign} installed beside it; run `pip uninstall gradbench`, then "
                "reinstall gradbench-surgery."
            )
        code = app(args=arguments or ["--help"], prog_name="gradbench", standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt, without a word
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except TyperException as error:
        return _complain(_usage(error), error.exit_code)
    except GradBenchError as error:
        if debug:
            traceback.print_exception(error)
        return _complain(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("Interrupted; the same command goes on with the run.", INTERRUPTED)
    except Exception as error:  # a fault of ours: one line, or all of it with --debug
        if debug:
            traceback.print_exception(error)
        return _complain(
            f"Expected no fault in GradBench, found {type(error).__name__}: {error}. "
            "Please report it with what --debug prints.",
            1,
        )


def _usage(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "gradbench"
    message = error.format_message().strip().rstrip(".")
    return f"Expected a command as in `{command} --help`, found this: {message}."


def _complain(message: str, code: int) -> int:
    line = " ".join(message.split())
    if line:
        print(f"error: {line}", file=sys.stderr)
    return code
