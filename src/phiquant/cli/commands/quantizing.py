"""Files made smaller: `quantize`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import (
    MIX_TOKENS,
    HfRepo,
    KeepNan,
    MaxMemory,
    NoTensorFirstSplit,
    Quiet,
    Resume,
    SplitMaxSize,
    SplitMaxTensors,
)

__all__ = ["quantize"]


def quantize(
    arguments: Annotated[
        list[str],
        Argument(
            metavar="IN [OUT] TYPE [NTHREADS]",
            help="IN: a GGUF file, a checkpoint's folder or a repository; none with --hf-repo. OUT: by default a name "
            "with the type in it. "
            "TYPE: such as Q4_K_M, or llama.cpp's number, or COPY; none with --budget or --plan.",
        ),
    ],
    hf_repo: HfRepo = None,
    pure: Annotated[bool, Option("--pure", help="One type for all tensors, instead of llama.cpp's mixture.")] = False,
    output_tensor_type: Annotated[
        str | None, Option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
    ] = None,
    token_embedding_type: Annotated[
        str | None, Option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        Option(
            "--tensor-type",
            metavar="PATTERN=TYPE",
            help="Type of the tensors whose name holds this regular expression; may be repeated, the first match wins.",
        ),
    ] = None,
    tensor_type_file: Annotated[
        Path | None,
        Option(
            "--tensor-type-file",
            metavar="FILE",
            help="Further PATTERN=TYPE from a file, separated by spaces or newlines; they come after --tensor-type.",
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        Option("--imatrix", metavar="FILE", help="Weigh errors by this importance matrix, GGUF or .dat."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        Option("--calibrate", metavar="TEXT", help="Let the model read this text, and round for what it computes."),
    ] = None,
    method: Annotated[
        str | None,
        Option(
            "--method",
            metavar="HOW",
            help="feedback: carry rounding errors on to where they cancel, the default with --calibrate or "
            "--statistics; imatrix: weigh errors by an importance matrix; plain: neither.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        Option(
            "--calibration-tokens",
            metavar="N",
            min=1,
            help="Read at most so many tokens of the text; 16384 by default, and all for an importance matrix.",
        ),
    ] = None,
    damping: Annotated[
        float | None,
        Option(
            "--damping",
            metavar="D",
            help="For feedback: added to the diagonal of the inputs' moments, as a part of its mean; 0.03 by default.",
        ),
    ] = None,
    column_order: Annotated[
        str | None,
        Option(
            "--column-order",
            metavar="HOW",
            help="For feedback: round columns in the order of their inputs' squares (activation, the default) or as "
            "they stand (file).",
        ),
    ] = None,
    search_rounds: Annotated[
        int | None,
        Option(
            "--search-rounds",
            metavar="N",
            min=0,
            help="For feedback: fit scales and levels of a block to one another so often; 3 by default.",
        ),
    ] = None,
    search_sweeps: Annotated[
        int | None,
        Option(
            "--search-sweeps",
            metavar="N",
            min=0,
            help="For feedback: go through all blocks of a matrix once more, so often; 1 by default.",
        ),
    ] = None,
    curvature_tokens: Annotated[
        int | None,
        Option(
            "--curvature-tokens",
            metavar="N",
            min=0,
            help="For feedback: learn from so many tokens which errors cost most; 8192 by default, 2048 for models "
            "of a billion weights and more, 0 for none.",
        ),
    ] = None,
    drawn_share: Annotated[
        float | None,
        Option(
            "--drawn-share",
            metavar="S",
            help="For feedback: put tokens drawn at random in the place of this part of the text, 0 to 0.5, so that "
            "less depends on which text it is; a third by default.",
        ),
    ] = None,
    distill: Annotated[
        bool,
        Option(
            "--distill",
            help="Then tune the scales of the blocks and the norms for the original's predictions of the text; "
            "kept if it pays on the part of the text that is held out.",
        ),
    ] = False,
    distill_epochs: Annotated[
        int | None,
        Option("--distill-epochs", metavar="N", min=1, help="How often that goes through the text; 2 by default."),
    ] = None,
    distill_tokens: Annotated[
        int | None,
        Option(
            "--distill-tokens",
            metavar="N",
            min=1,
            help="Read at most so many tokens of the text for it; 32768 by default.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        Option(
            "--statistics",
            metavar="FILE",
            help="For feedback: use what was collected in this file, or collect it there first.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        Option(
            "--measure/--no-measure",
            help="After --calibrate, compare the result with the original on the last tenth of the text, which is then "
            "kept from the calibration, and record the figures in the file; inspect shows them.",
        ),
    ] = True,
    measure_text: Annotated[
        Path | None,
        Option("--measure-text", metavar="TEXT", help="Measure on this text instead, with or without --calibrate."),
    ] = None,
    budget: Annotated[
        str | None,
        Option(
            "--budget",
            metavar="SIZE",
            help="Instead of TYPE: the type of every weight is chosen so that the file keeps this size and the model "
            "diverges least on the text of --calibrate. 2.2GB, 900MiB, 4.25bpw (bits per weight), 30% (of IN).",
        ),
    ] = None,
    plan_only: Annotated[
        bool, Option("--plan-only", help="With --budget: print the types and what they cost; write no model.")
    ] = False,
    save_plan: Annotated[
        Path | None, Option("--save-plan", metavar="FILE", help="With --budget: write the types to a file (TOML).")
    ] = None,
    plan: Annotated[
        Path | None, Option("--plan", metavar="FILE", help="Instead of TYPE: the types that this file has.")
    ] = None,
    reader: Annotated[
        str,
        Option("--reader", metavar="NAME", help="Of the types that this program reads: llama.cpp or ours (phiquant)."),
    ] = "llama.cpp",
    mix_types: Annotated[
        str | None, Option("--mix-types", metavar="TYPE,...", help="With --budget: of these types alone, and IN's own.")
    ] = None,
    sensitivity_tokens: Annotated[
        int,
        Option("--sensitivity-tokens", metavar="N", help="With --budget: tokens that are read for each measurement."),
    ] = MIX_TOKENS,
    include_weights: Annotated[
        list[str] | None,
        Option(
            "--include-weights", metavar="NAME", help="Use it only for weights with this in their name; repeatable."
        ),
    ] = None,
    exclude_weights: Annotated[
        list[str] | None,
        Option(
            "--exclude-weights", metavar="NAME", help="Do not use it for weights with this in their name; repeatable."
        ),
    ] = None,
    prune_layers: Annotated[
        str | None, Option("--prune-layers", metavar="L0,L1,...", help="Leave these layers out, counted from 0.")
    ] = None,
    leave_output_tensor: Annotated[bool, Option("--leave-output-tensor", help="Leave output.weight as it is.")] = False,
    allow_requantize: Annotated[
        bool, Option("--allow-requantize", help="Quantize what is quantized already, at a loss.")
    ] = False,
    override_kv: Annotated[
        list[str] | None,
        Option("--override-kv", metavar="KEY=TYPE:VALUE", help="Change or add metadata: int, float, bool or str."),
    ] = None,
    keep_nan: KeepNan = False,
    keep_split: Annotated[bool, Option("--keep-split", help="Write parts as the source has them.")] = False,
    split_max_tensors: SplitMaxTensors = None,
    split_max_size: SplitMaxSize = None,
    no_tensor_first_split: NoTensorFirstSplit = False,
    resume: Resume = False,
    max_memory: MaxMemory = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and the file's size; write nothing.")] = False,
    quiet: Quiet = False,
) -> int:
    """Quantize a GGUF file, a checkpoint or a repository, in one step."""
    from .. import quantize as body
    from ..mixes import MixOptions
    from ..notices import Notices
    from ..quantize_options import QuantizeOptions, SearchOptions
    from ..sizes import parse_size
    from ..split import division_of

    options = QuantizeOptions(
        pure=pure,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        tensor_type=tensor_type or [],
        tensor_type_file=tensor_type_file,
        imatrix=imatrix,
        calibrate=calibrate,
        method=method,
        calibration_tokens=calibration_tokens,
        search=SearchOptions(
            damping=damping,
            column_order=column_order,
            search_rounds=search_rounds,
            search_sweeps=search_sweeps,
            curvature_tokens=curvature_tokens,
            drawn_share=drawn_share,
        ),
        distill=distill,
        distill_epochs=distill_epochs,
        distill_tokens=distill_tokens,
        statistics=statistics,
        measure=measure,
        measure_text=measure_text,
        include_weights=include_weights or [],
        exclude_weights=exclude_weights or [],
        prune_layers=prune_layers,
        leave_output_tensor=leave_output_tensor,
        allow_requantize=allow_requantize,
        override_kv=override_kv or [],
        keep_nan=keep_nan,
        division=division_of(split_max_tensors, split_max_size, no_tensor_first_split),
        keep_split=keep_split,
        resume=resume,
        max_memory=None if max_memory is None else parse_size("--max-memory", max_memory),
        dry_run=dry_run,
        quiet=quiet,
        mix=MixOptions(
            budget=budget,
            plan=plan,
            plan_only=plan_only,
            save_plan=save_plan,
            reader=reader,
            mix_types=mix_types,
            sensitivity_tokens=sensitivity_tokens,
        ),
    )
    with Notices(quiet=quiet).compiling():
        return body.quantize(arguments, options, repository=hf_repo)
