"""`voroq quantize`: a model in, a smaller model out."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table

from voroq.cli import options
from voroq.cli.console import duration, emit, err, size
from voroq.cli.progress import terminal_progress
from voroq.errors import VoroqError


class Mode(StrEnum):
    parallel = "parallel"
    sequential = "sequential"
    asymmetric = "asymmetric"


class Hessian(StrEnum):
    auto = "auto"
    input = "input"
    two_sided = "two-sided"
    guided = "guided"


class EffortName(StrEnum):
    fast = "fast"
    balanced = "balanced"
    best = "best"


Bits = Annotated[
    float | None,
    typer.Option(
        metavar="B",
        help="Bits per weight at most, over the linears of the blocks, everything stored counted. "
        "Default: 2.0 for vptq, 3.25 for pvq, 4.25 for gptq and rtn; none if options set the rate.",
        show_default=False,
    ),
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write (with --resume: the unfinished one).", show_default=False)]
Samples = Annotated[int | None, typer.Option(min=1, metavar="N", help="Windows of that text. Default: 512.", show_default=False)]
Context = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens in a window. Default: the model's, at most 2048.", show_default=False)
]
Option = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the method, repeatable; see voroq methods.", show_default=False),
]
CalibrationSource = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="A .txt, .jsonl or .json file, calibration-mixed (bundled, the default), calibration-c4, or dataset:NAME[:CONFIG[:SPLIT]]; "
        "repeatable.",
        show_default=False,
    ),
]
HessianKind = Annotated[
    Hessian,
    typer.Option(
        help="What errors are weighed by. input: the second moments of each linear's inputs. two-sided: of the gradients at its outputs "
        "too, by one backward pass, block by block. guided (vptq): of the inputs, for every group of outputs by "
        "its gradients. auto: two-sided where the method uses it (vptq, pvq)."
    ),
]


ModeKind = Annotated[
    Mode,
    typer.Option(
        help="What a block sees: the original model (parallel), or the quantized blocks before it (sequential); asymmetric: those, and "
        "weights first become the ones that answer them as the originals answered the original's inputs."
    ),
]
EffortKind = Annotated[
    EffortName | None,
    typer.Option(
        help="fast: nothing is tuned, one block in memory. balanced: text of its own beside the calibration text, for vptq fewer channels "
        "where that pays, then the whole model tuned towards the original's logits (both in memory). best: more text of its own, more "
        "windows where they are short, a longer search and a longer tuning. Default: balanced for vptq, fast for other methods and with "
        "--tune-blocks.",
        show_default=False,
    ),
]
PlanFile = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Settings of every linear, as voroq plan writes them, instead of --bits.", show_default=False),
]
Allocate = Annotated[
    bool | None,
    typer.Option(
        "--allocate/--no-allocate",
        help="Spend the bits where they are worth most: what voroq plan does, and then quantize. By default for vptq and pvq with --bits, "
        "and for every method that an effort tunes.",
        show_default=False,
    ),
]
Interleave = Annotated[
    bool,
    typer.Option(
        "--interleave/--no-interleave",
        help="Reorder the channels inside MLPs (the function stays) so that every vector of weights holds large ones and small ones.",
    ),
]
OwnText = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Documents that MODEL writes itself first, to calibrate on beside the text (voroq write); 0: none. Default: 512 for balanced, "
        "4096 for best.",
        show_default=False,
    ),
]
ChannelsKept = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Leave the cheapest channels of MLPs out, all but N of each, and give their bits to the others (voroq prune): --bits is per "
        "weight of MODEL as it was. 0: all stay. Default: for vptq as many as the plan finds to pay, "
        "with --effort fast and for other methods all stay.",
        show_default=False,
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="ORIGINAL", help="Tune towards the answers of this model, of which MODEL is a pruned form.", show_default=False
    ),
]
TuneBlocks = Annotated[
    int, typer.Option(min=0, metavar="STEPS", help="Steps to tune every block for, towards the original block's output; 0: none.")
]


def parse_options(pairs: list[str]) -> dict[str, str]:
    """["key=value"] as a dict. Raises VoroqError for a pair without "=" and for a key given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key or not value.strip():
            raise VoroqError(f"--option {pair} is not KEY=VALUE: write for example --option damping=0.01")
        if key in found:
            raise VoroqError(f"--option {key} is given twice: give it once")
        found[key] = value.strip()
    return found


def quantize(
    model: options.Model,
    out: Out,
    method: Annotated[str, typer.Option(metavar="vptq|pvq|gptq|rtn", help="How; see voroq methods.")] = "vptq",
    bits: Bits = None,
    option: Option = None,
    plan: PlanFile = None,
    allocate: Allocate = None,
    calibration: CalibrationSource = None,
    samples: Samples = None,
    context: Context = None,
    mode: ModeKind = Mode.parallel,
    hessian: HessianKind = Hessian.auto,
    interleave: Interleave = True,
    effort: EffortKind = None,
    own_text: OwnText = None,
    channels: ChannelsKept = None,
    teacher: Teacher = None,
    tune_blocks: TuneBlocks = 0,
    activation_bits: options.ActivationBits = None,
    activation_kind: options.ActivationKind = "integers",
    device: options.Device = "auto",
    seed: options.Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in OUT, settings unchanged.")] = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Quantize MODEL into the new folder OUT.

    OUT is an ordinary Hugging Face folder (config, safetensors, tokenizer, model card) plus voroq_report.json with the loss, bits
    and seconds of every layer. Each finished block is on disk at once: after an interruption, the same command with --resume
    goes on and ends with the same bytes.

    [bold]Examples[/]

      voroq quantize meta-llama/Llama-3.2-1B out --bits 2.1

      voroq quantize ./large-model out --bits 2.1 --effort fast

      voroq quantize ./my-model out --bits 2.1 --tune-blocks 60

      voroq quantize ./my-model out --method gptq --option bits=3 --option group_size=64

      voroq quantize ./my-model out --method pvq --bits 3 --activation-bits 8

      voroq quantize ./my-model out --calibration my-text.jsonl --samples 256 --context 2048

      voroq methods   (lists every method and its options)
    """
    pairs = parse_options(option or [])
    if plan is not None and (bits is not None or pairs or allocate):
        raise VoroqError("--plan says everything that --bits, --option and --allocate say; give one or the other")
    from voroq.activations import Activations
    from voroq.pipeline.effort import EFFORTS
    from voroq.pipeline.plan import make_plan
    from voroq.pipeline.planning import read_plan
    from voroq.prelude import quantize_with
    from voroq.tuning.loop import Tuning

    if effort is None:
        effort = EffortName.balanced if method == "vptq" and not tune_blocks else EffortName.fast
    chosen = EFFORTS[effort.value]
    wanted = read_plan(plan) if plan is not None else make_plan(method, bits, chosen.completed(method, pairs))
    text = {"calibration": calibration or None, "samples": samples, "context": context, "own_text": own_text}
    how = {"mode": mode.value, "hessian": hessian.value, "interleave": interleave, "allocate": allocate, "teacher": teacher, "seed": seed}
    how |= {"channels": channels, "block_tuning": Tuning(steps=tune_blocks) if tune_blocks else None, "resume": resume}
    how |= {} if activation_bits is None else {"activations": Activations(activation_bits, activation_kind)}
    place = {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    with terminal_progress(err()) as progress:
        report = quantize_with(chosen, model, out, wanted, progress=progress, **text, **how, **place)
    emit(report, as_json, summary(report, out))


def summary(report: dict, out: str) -> Table:
    """What the run made, in a few lines."""
    table = Table(show_header=False, box=None)
    table.add_row("written to", out)
    bits, share = report["bits_per_weight"], report.get("share_of_weights", 1.0)
    left = "" if share == 1 else f" of the {100 * share:.1f} % that are left; {share * bits:.3f} of what {report['source']} has"
    table.add_row("bits per weight", f"{bits:.3f}{left}")
    table.add_row("time", duration(report["seconds"]))
    table.add_row("peak memory", size(report["peak_memory"]["rss"]))
    if report["tuning"]:
        table.add_row("tuning", f"KL on held-out text {report['tuning']['kl_before']:.4f} -> {report['tuning']['kl_after']:.4f}")
    table.add_row("measure it", f"voroq eval {out} --against {report['source']}")
    table.add_row("try it", f'voroq generate {out} "Once"')
    return table
