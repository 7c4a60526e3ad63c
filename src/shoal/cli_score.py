"""The commands about lm-eval: score, lm-eval, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from shoal.cli_options import DeviceOption, QuietOption, terminal
from shoal.errors import EvaluationError, RunError

# lm-eval's flags that may carry a value
OPTIONAL_VALUE = (
    "--apply_chat_template",
    "--apply-chat-template",
    "--fewshot_as_multiturn",
    "--fewshot-as-multiturn",
)


class Score(TyperCommand):
    """Gives a flag without a value, which typer does not know, the value that lm-eval takes it for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        following = [*args[1:], "-"]
        return super().parse_args(
            ctx,
            [
                f"{arg}=true" if arg in OPTIONAL_VALUE and after.startswith("-") else arg
                for arg, after in zip(args, following, strict=False)
            ],
        )


def score(
    model: Annotated[str, typer.Argument(help="Hub id, folder, zoo:tiny/base, or base+adapter.")],
    tasks: Annotated[
        str, typer.Option("--tasks", help="lm-eval tasks, groups and tags, separated by commas.")
    ],
    include_path: Annotated[
        str | None,
        typer.Option(
            "--include_path", "--include-path", help="Folder with more task YAMLs; zoo:tiny/tasks works."
        ),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option("--num_fewshot", "--num-fewshot", min=0)] = None,
    limit: Annotated[
        float | None, typer.Option(help="Only the first items of each task; below 1: this share.")
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch_size", "--batch-size", help="Rows, or auto; halved when memory runs out.")
    ] = "64",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    apply_chat_template: Annotated[
        str | None,
        typer.Option(
            "--apply_chat_template", "--apply-chat-template", metavar="[NAME]", help="Of the tokenizer."
        ),
    ] = None,
    fewshot_as_multiturn: Annotated[
        str | None,
        typer.Option(
            "--fewshot_as_multiturn",
            "--fewshot-as-multiturn",
            metavar="[true|false]",
            help="Default: true with a chat template.",
        ),
    ] = None,
    system_instruction: Annotated[
        str | None, typer.Option("--system_instruction", "--system-instruction")
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option("--gen_kwargs", "--gen-kwargs", help="key=value,key=value or JSON, for generation."),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output_path", "--output-path", "-o", help="Folder or .json for lm-eval's results file."
        ),
    ] = None,
    log_samples: Annotated[
        bool, typer.Option("--log_samples", "--log-samples", "-s", help="Also lm-eval's samples files.")
    ] = False,
    device: DeviceOption = "auto",
    quiet: QuietOption = False,
) -> None:
    """Score one model on lm-eval tasks; options are spelled as in lm-eval."""
    from shoal.preflight import resolve_include_path
    from shoal.score import score_model

    console = terminal()
    say = (lambda text: None) if quiet else (lambda text: console.print(text, markup=False, highlight=False))
    scores = score_model(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        include_path=resolve_include_path(include_path, Path(), say),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=_batch_size(batch_size),
        dtype=dtype,
        device=device,
        apply_chat_template=True if apply_chat_template == "true" else apply_chat_template or False,
        fewshot_as_multiturn=None
        if fewshot_as_multiturn is None
        else fewshot_as_multiturn.lower() in ("true", "1", "yes"),
        system_instruction=system_instruction,
        gen_kwargs=_keys_and_values(gen_kwargs),
        output_path=output_path,
        log_samples=log_samples,
        say=say,
    )
    console.print(_score_table(model, scores.rows))
    if scores.speed is not None:
        console.print(scores.speed.words(), markup=False, highlight=False)
    for path in scores.files:
        console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)


def _score_table(title: str, rows: Any) -> Any:
    from rich.table import Table

    table = Table("task", "metric", "", "value", "stderr", "items", title=title, title_justify="left")
    better = {True: "higher is better", False: "lower is better", None: ""}
    for row in rows:
        error = "" if row.stderr is None else f"{row.stderr:.4f}"
        name = f"{'  ' * row.depth}{row.task}"
        table.add_row(
            name, row.metric, better[row.higher_is_better], f"{row.value:.4f}", error, str(row.items)
        )
    return table


def _batch_size(text: str) -> int | str:
    if text.isdecimal() and int(text):
        return int(text)
    if text.partition(":")[0] != "auto":
        raise EvaluationError(f"--batch_size: expected a number of rows or auto, found {text!r}")
    return text


def _keys_and_values(text: str | None) -> dict[str, Any] | None:
    """lm-eval's spelling of several values in one argument: JSON, or key=value,key=value."""
    if text is None:
        return None
    from lm_eval._cli.utils import key_val_to_dict, try_parse_json

    try:
        found = try_parse_json(text)
        return found if isinstance(found, dict) else dict(key_val_to_dict(text))
    except ValueError as error:
        raise EvaluationError(f"--gen_kwargs: {error}") from None


class PassedOn(TyperCommand):
    """A command whose arguments, --help among them, are somebody else's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


def lm_eval(ctx: typer.Context) -> None:
    """lm-eval's own command line, with `--model shoal` known to it: `shoal lm-eval run --model shoal ...`."""
    import shoal.evals  # noqa: F401 - registers the model

    before = sys.argv
    sys.argv = ["lm-eval", *ctx.args]
    try:
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    finally:
        sys.argv = before


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    to_lm_eval: Annotated[
        bool, typer.Option("--lm-eval", "--lm_eval", help="As lm-eval's results and samples files.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write to; default RUN/lm-eval.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Write the test scores of a run's parents and winner for other tools; nothing is scored again."""
    if not to_lm_eval:
        raise RunError("say as what: --lm-eval")
    from shoal.export import export_lm_eval

    written = export_lm_eval(run, out, say=(lambda text: None) if quiet else typer.echo)
    typer.echo(f"{sum(map(len, written.values()))} files of {len(written)} models")
