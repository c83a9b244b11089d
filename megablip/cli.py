"""The installed command: `megablip train | convert | eval | replay | doctor`.

Heavy imports wait until a verb needs them, so that help and the errors of a
recipe come at once.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megablip.engine.topology import announce_cpu
from megablip.errors import MegablipError


class Weights(StrEnum):
    """What `replay` computes a loss with."""

    step = "step"
    checkpoint = "checkpoint"
    none = "none"


class AskedTask(StrEnum):
    """What `eval` asks: megablip.evaluate.tasks says more."""

    reading = "reading"
    conversation = "conversation"
    safety = "safety"
    shots = "shots"


Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16")]
RemoteCode = Annotated[
    bool, typer.Option("--remote-code", help="add the model's code: loads without megablip by trust_remote_code=True")
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
convert_app = typer.Typer(no_args_is_help=True, help="Convert checkpoints.")
app.add_typer(convert_app, name="convert")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.subkey=value ...")] = None,
) -> None:
    """Train as a recipe says, on this machine's ranks.

    Ends with 0 when the run is finished, 75 when it was asked to stop and has
    saved (start it again to go on), 1 when it failed.
    """
    from megablip.launch import launch

    raise typer.Exit(launch(recipe, overrides or []))


@convert_app.command("zero-to-hf")
def zero_to_hf(
    source: Annotated[Path, typer.Argument(help="run directory, one of its checkpoints, or one that DeepSpeed saved")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    dtype: Dtype = "fp32",
    remote_code: RemoteCode = False,
    like: Annotated[
        Path | None, typer.Option(help="for DeepSpeed's files: folder of the model with config and frozen weights")
    ] = None,
    strip_prefix: Annotated[str, typer.Option(help="for DeepSpeed's files: what their names begin with")] = "",
) -> None:
    """Turn a checkpoint into Hugging Face weights, config and tokenizer; adapters are merged."""
    from megablip.checkpoint.deepspeed_files import is_deepspeed

    if is_deepspeed(source):
        from megablip.convert.zero_files import zero_files_to_hf

        zero_files_to_hf(source, output, dtype, like=like, strip_prefix=strip_prefix, remote_code=remote_code)
        return
    if like or strip_prefix:
        raise typer.BadParameter("--like and --strip-prefix are for checkpoints that DeepSpeed saved")
    from megablip.convert.to_hf import zero_to_hf

    zero_to_hf(source, output, dtype, remote_code)


@convert_app.command("merge-lora")
def merge_lora(
    adapter: Annotated[Path, typer.Argument(help="folder that peft has saved")],
    base: Annotated[Path, typer.Argument(help="Hugging Face folder that the adapter was trained on")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    dtype: Dtype = "fp32",
    remote_code: RemoteCode = False,
    any_base: Annotated[
        bool,
        typer.Option("--any-base", help="merge though the adapter names another base: a folder may have been renamed"),
    ] = False,
) -> None:
    """Add a LoRA adapter to the weights of its base."""
    from megablip.convert.lora import merge_lora

    merge_lora(adapter, base, output, dtype, remote_code, any_base)


@convert_app.command("xgenmm-to-hf")
def xgenmm_to_hf(
    source: Annotated[Path, typer.Argument(help="released xGen-MM weights: folder, safetensors or .pt file")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    config: Annotated[Path | None, typer.Option(help="config.json, for other sizes than those of v1.5")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="folder of the decoder's tokenizer [default: SOURCE]")] = None,
    tower: Annotated[Path | None, typer.Option(help="folder of the SigLIP model, if SOURCE lacks its weights")] = None,
    dtype: Dtype = "fp32",
    remote_code: RemoteCode = False,
) -> None:
    """Turn released xGen-MM weights into a Hugging Face folder; say which values have no place in it."""
    from megablip.convert.xgenmm import xgenmm_to_hf

    lost = xgenmm_to_hf(
        source, output, config=config, tokenizer=tokenizer, tower=tower, dtype=dtype, remote_code=remote_code
    )
    for line in lost:
        print(f"no place: {line}")


@convert_app.command("hf-to-xgenmm")
def hf_to_xgenmm(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder of a megablip model")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    dtype: Dtype = "fp32",
    lavis: Annotated[bool, typer.Option("--lavis", help="a .pt file with bare names, as LAVIS loads it")] = False,
) -> None:
    """Write a model under the released xGen-MM names; say what has no place there, or no value here."""
    from megablip.convert.xgenmm import hf_to_xgenmm

    for line in hf_to_xgenmm(source, output, dtype=dtype, lavis=lavis):
        print(line)


@convert_app.command("average")
def average(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run directory")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
    last: Annotated[int, typer.Option(help="how many checkpoints, counted from the newest")] = 2,
    dtype: Dtype = "fp32",
    remote_code: RemoteCode = False,
) -> None:
    """Write the mean of a run's last checkpoints as Hugging Face weights."""
    from megablip.convert.average import average

    average(run_dir, output, last, dtype, remote_code)


@convert_app.command("inspect")
def inspect(
    source: Annotated[Path, typer.Argument(help="checkpoint of any kind")],
    depth: Annotated[int, typer.Option(help="parts of a name that make a row", min=0)] = 3,
) -> None:
    """Show what a checkpoint holds, from its manifest and headers alone."""
    from megablip.convert.inspect import inspect

    inspect(source, depth)


@convert_app.command("verify")
def verify(source: Annotated[Path, typer.Argument(help="checkpoint of any kind")]) -> None:
    """Check hashes, shapes and that all values are finite. Ends with 1, and the list, if something is wrong."""
    from megablip.convert.verify import verify

    wrong = verify(source)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{source}: {f'{len(wrong)} things are wrong' if wrong else 'whole'}")
    raise typer.Exit(1 if wrong else 0)


@convert_app.command("diff")
def diff(
    one: Annotated[Path, typer.Argument(help="checkpoint of any kind")],
    other: Annotated[Path, typer.Argument(help="checkpoint of any kind")],
) -> None:
    """Compare two checkpoints: names, shapes, values.

    Ends with 0 if they are the same, with 1 if not, with 2 if it can't tell.
    """
    from megablip.convert.diff import diff

    try:
        same = diff(one, other)
    except MegablipError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if same else 1)


@convert_app.command("import-zero")
def import_zero(
    source: Annotated[Path, typer.Argument(help="checkpoint that DeepSpeed saved, or its universal format")],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of the run that goes on")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.subkey=value ...")] = None,
    tokens: Annotated[int | None, typer.Option(help="trained so far, for recipes that count them", min=0)] = None,
    strip_prefix: Annotated[str, typer.Option(help="what the names there begin with")] = "",
    allow_changes: Annotated[bool, typer.Option(help="of weight decay, betas and eps")] = False,
) -> None:
    """Make a run begun elsewhere one of ours: weights, moments and steps, at any number of ranks."""
    from megablip.take_over import take_over

    take_over(source, recipe, overrides or [], tokens=tokens, strip_prefix=strip_prefix, allow_changes=allow_changes)


@convert_app.command("export-zero")
def export_zero(
    source: Annotated[Path, typer.Argument(help="run directory, or one of its checkpoints")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
) -> None:
    """Turn a checkpoint into DeepSpeed's universal format, with which a run goes on elsewhere."""
    from megablip.convert.export_zero import export_zero

    export_zero(source, output)


@convert_app.command("init")
def init(
    output: Annotated[Path, typer.Argument(help="folder to write")],
    tower: Annotated[Path, typer.Option(help="folder of a SigLIP or CLIP model, or of its vision part")],
    decoder: Annotated[
        Path | None, typer.Option(help="folder of a causal language model [default: random, of the sizes in --model]")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="folder of a tokenizer; gets the tokens it lacks [default: the decoder's]")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="YAML: sampler, grids, a random decoder's sizes [default: those of xGen-MM]")
    ] = None,
    seed: int = 0,
    dtype: Dtype = "fp32",
) -> None:
    """Make the folder a stage starts from: given tower and decoder, or a random one; the sampler is random."""
    from megablip.convert.init import init_model

    init_model(output, tower=tower, tokenizer=tokenizer, decoder=decoder, model=model, seed=seed, dtype=dtype)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="folder of a Hugging Face export")],
    shards: Annotated[str, typer.Argument(help="held-out shards: path, glob or braces")],
    output: Annotated[Path, typer.Option(help="folder for results.json and report.html")],
    run_dir: Annotated[Path | None, typer.Option(help="run whose loss curve the report shows")] = None,
    limit: Annotated[int | None, typer.Option(help="samples at most", min=1)] = None,
    task: Annotated[
        AskedTask, typer.Option(help="what is asked, and of which schema the shards are")
    ] = AskedTask.reading,
) -> None:
    """Ask an exported model about held-out samples, greedily; count exact matches and refusals."""
    from megablip.evaluate.evaluation import evaluate

    evaluate(model, shards, output, task.value, run_dir=run_dir, limit=limit)


@app.command()
def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run directory")],
    step: Annotated[int | None, typer.Option(help="step to replay, as metrics.jsonl counts them")] = None,
    diff: Annotated[Path | None, typer.Option(metavar="OTHER_RUN", help="run to compare with")] = None,
    page: Annotated[Path | None, typer.Option(help="HTML file to write [default: replay_STEP.html]")] = None,
    weights: Annotated[
        Weights, typer.Option(help="of the loss: the step's own, those of the checkpoint before it, or no loss")
    ] = Weights.step,
) -> None:
    """Show a step's global batch and compute its loss again, or find where two runs part.

    Nothing in RUN is written. Ends with 0; with 1 when the data are not those
    that were logged, or the runs differ; with 2 when it can't tell.
    """
    if (step is None) == (diff is None):
        raise typer.BadParameter("give either --step or --diff")
    try:
        if diff:
            from megablip.replay.diff import compare

            same = compare(run_dir, diff)
        else:
            from megablip.replay.step import replay

            same = replay(run_dir, step, page or Path(f"replay_{step:08d}.html"), weights.value)
    except MegablipError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if same else 1)


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="YAML recipe; whether it could start is looked at too")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.subkey=value ...")] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="check the GPU paths, in ten minutes (without a GPU: small)")
    ] = False,
    output: Annotated[Path, typer.Option(help="JSON that --gpu writes")] = Path("doctor.json"),
) -> None:
    """Say what this machine has and whether a run would start; with --gpu, compare its results with the reference.

    With a recipe, also whether its model, shards and directories are there and its numbers fit together.

    Ends with 0 if all is right, else with 1.
    """
    if gpu and recipe:
        raise typer.BadParameter("--gpu takes no recipe: it brings its own")
    if gpu:
        from megablip.doctor.gpu import doctor_gpu

        raise typer.Exit(doctor_gpu(output))
    from megablip.doctor import doctor

    raise typer.Exit(doctor(recipe, overrides or []))


def main() -> None:
    announce_cpu()
    try:
        app()
    except MegablipError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
