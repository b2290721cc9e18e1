"""The arguments and options of `phiquant quantize`, and what makes no sense among them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from phiquant.cli.mixes import MixOptions
from phiquant.convert import Target, parse_file_type
from phiquant.convert.parts import WHOLE, Division
from phiquant.errors import RequestError, TypeNameError

__all__ = [
    "METHODS",
    "Arguments",
    "QuantizeOptions",
    "SearchOptions",
    "check_distill",
    "check_mix",
    "method_of",
    "parse_arguments",
]

METHODS: Final = ("feedback", "imatrix", "plain")
ORDERS: Final = ("activation", "file")
"""Of columns, as error feedback rounds them."""


@dataclass(frozen=True)
class Arguments:
    """The arguments without a name."""

    model: str
    outfile: Path | None
    target: Target | None  # None: a mix, which has none
    threads: int  # 0: one for each core


@dataclass(frozen=True)
class SearchOptions:
    """How error feedback seeks blocks; None: as `calibrate.Search` has it."""

    damping: float | None = None
    column_order: str | None = None
    search_rounds: int | None = None
    search_sweeps: int | None = None
    curvature_tokens: int | None = None
    drawn_share: float | None = None

    def check(self, method: str) -> None:
        """RequestError if anything is asked for that another method, or none, would not do."""
        for name, value in vars(self).items():
            if value is not None and method != "feedback":
                option = f"--{name.replace('_', '-')}"
                raise RequestError(f"{option} is for --method feedback, not {method}; leave it out.")
        if self.column_order not in (None, *ORDERS):
            raise RequestError(f"--column-order is {' or '.join(ORDERS)}, not {self.column_order!r}.")

    @property
    def given(self) -> dict[str, Any]:
        """What `calibrate.Search` is to be made with."""
        values = {
            "damping": self.damping,
            "by_activation": None if self.column_order is None else self.column_order == ORDERS[0],
            "rounds": self.search_rounds,
            "sweeps": self.search_sweeps,
            "curvature_tokens": self.curvature_tokens,
            "drawn": self.drawn_share,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class QuantizeOptions:
    """llama-quantize's options as they are written."""

    pure: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_type: Sequence[str] = ()
    tensor_type_file: Path | None = None
    imatrix: Path | None = None
    calibrate: Path | None = None
    method: str | None = None
    calibration_tokens: int | None = None
    statistics: Path | None = None
    search: SearchOptions = field(default_factory=SearchOptions)
    distill: bool = False
    distill_epochs: int | None = None
    distill_tokens: int | None = None
    measure: bool = True
    measure_text: Path | None = None
    include_weights: Sequence[str] = ()
    exclude_weights: Sequence[str] = ()
    prune_layers: str | None = None
    leave_output_tensor: bool = False
    allow_requantize: bool = False
    override_kv: Sequence[str] = ()
    keep_nan: bool = False
    division: Division = WHOLE
    keep_split: bool = False
    resume: bool = False
    max_memory: int | None = None
    dry_run: bool = False
    quiet: bool = False
    mix: MixOptions = field(default_factory=MixOptions)


def parse_arguments(arguments: Sequence[str], *, mix: bool = False) -> Arguments:
    """Tell OUT from TYPE as llama-quantize does: the second argument is the type if it is the name or number of one.

    For a `mix` there is no TYPE.
    """
    if mix:
        return _parse_mix(arguments)
    if not 2 <= len(arguments) <= 4:
        raise RequestError("quantize takes IN [OUT] TYPE [NTHREADS], such as: quantize model-F16.gguf Q4_K_M")
    model, *rest = arguments
    outfile: Path | None = None
    if len(rest) > 1 and not _names_a_type(rest[0]):
        outfile = Path(rest.pop(0))
    target = parse_file_type(rest[0])
    threads = rest[1] if len(rest) > 1 else "0"
    if len(rest) > 2 or not (threads.isascii() and threads.isdecimal()):
        raise RequestError(f"{rest[-1]!r} is not a number of threads; quantize takes IN [OUT] TYPE [NTHREADS].")
    return Arguments(model, outfile, target, int(threads))


def _parse_mix(arguments: Sequence[str]) -> Arguments:
    if not 1 <= len(arguments) <= 3:
        raise RequestError("with --budget or --plan, quantize takes IN [OUT [NTHREADS]]")
    model, *rest = arguments
    for text in rest[:1] if len(rest) < 2 or not _names_a_type(rest[1]) else rest[1:]:
        if _names_a_type(text) and (len(rest) < 2 or not text.isdecimal()):
            raise RequestError(f"--budget and --plan choose the types themselves; leave {text} out.")
    threads = rest[1] if len(rest) > 1 else "0"
    if not (threads.isascii() and threads.isdecimal()):
        raise RequestError(f"{threads!r} is not a number of threads; quantize takes IN [OUT [NTHREADS]] here.")
    return Arguments(model, Path(rest[0]) if rest else None, None, int(threads))


def _names_a_type(text: str) -> bool:
    try:
        parse_file_type(text)
    except TypeNameError:
        return False
    return True


def method_of(options: QuantizeOptions) -> str:
    """How weights are rounded, once what the options say of it makes sense; nothing has been read yet."""
    text, reads = options.calibrate, options.calibrate is not None or options.statistics is not None
    method = options.method or ("imatrix" if options.imatrix is not None else "feedback" if reads else "plain")
    if method not in METHODS:
        raise RequestError(f"--method is {', '.join(METHODS[:-1])} or {METHODS[-1]}, not {method!r}.")
    options.search.check(method)
    if options.imatrix is not None and reads and (options.mix.budget is None or method == "feedback"):
        raise RequestError("--imatrix and --calibrate both give an importance matrix; choose one of them.")
    if options.statistics is not None and method != "feedback":
        raise RequestError(f"--statistics is for --method feedback, not {method}; leave it out.")
    if options.statistics is not None and options.search.curvature_tokens is not None:
        raise RequestError(
            "--curvature-tokens reads a text, and --statistics rounds without one; leave one of them out."
        )
    if method == "feedback" and not reads:
        raise RequestError("--method feedback needs a text that the model reads; give one with --calibrate TEXT.")
    if method == "imatrix" and text is None and options.imatrix is None:
        raise RequestError("--method imatrix needs --imatrix FILE, or --calibrate TEXT to make one of.")
    if options.calibration_tokens is not None and (text is None or method == "plain"):
        raise RequestError("--calibration-tokens counts tokens of a text; give one with --calibrate TEXT.")
    if method == "plain" or not (reads or options.imatrix):
        for name, given in (("include", options.include_weights), ("exclude", options.exclude_weights)):
            if given:
                raise RequestError(
                    f"--{name}-weights chooses entries of an importance matrix; pass one with --imatrix."
                )
    if method == "plain" and options.imatrix is not None:
        raise RequestError("--method plain uses no importance matrix; leave out --imatrix or choose another method.")
    return method


def check_mix(options: QuantizeOptions, method: str) -> None:
    """Before anything is read: what the options say of a mix makes sense."""
    mix = options.mix
    mix.check()
    if not mix.wanted:
        return
    given = "--budget" if mix.budget is not None else "--plan"
    for name, used in (("--pure", options.pure), ("--prune-layers", options.prune_layers is not None)):
        if used:
            raise RequestError(f"{name} and {given} cannot be used together; leave one of them out.")
    if mix.budget is not None:
        if options.calibrate is None:
            raise RequestError("--budget measures what each weight costs; pass a text for it with --calibrate TEXT.")
        if method == "plain":
            raise RequestError("--budget weighs by importance, and --method plain does without; choose another method.")
        if options.dry_run:
            raise RequestError("--dry-run measures nothing, and --budget has to; use --plan-only to see the mix.")


def check_distill(options: QuantizeOptions) -> None:
    """Before anything is read: what the options say of a distillation makes sense."""
    if not options.distill:
        for name, given in (("epochs", options.distill_epochs), ("tokens", options.distill_tokens)):
            if given is not None:
                raise RequestError(f"--distill-{name} is for a distillation; ask for one with --distill.")
        return
    if options.calibrate is None:
        raise RequestError("--distill needs a text that the model reads; give one with --calibrate TEXT.")
    if options.prune_layers is not None:
        raise RequestError(
            "--distill compares with the whole model, which --prune-layers makes another one; leave one of them out."
        )
