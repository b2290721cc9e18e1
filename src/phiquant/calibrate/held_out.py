"""The end of a calibration text, kept from the calibration so that its result can be measured on it."""

from phiquant.errors import RequestError

__all__ = ["held_out"]

_SHARE = 10  # one chunk in so many
_LEAST = 2  # chunks on either side


def held_out(tokens: int, context: int) -> tuple[int, int]:
    """How many chunks of a text of `tokens` tokens are for calibration, and how many after them for measuring.

    Measured on is the last tenth, rounded to chunks of `context` tokens, and at least two of them; what is left over at
    the end is in neither. RequestError if there are not two chunks for each.
    """
    chunks = tokens // context
    if chunks < 2 * _LEAST:
        raise RequestError(
            f"the text has {tokens} tokens and must have at least {2 * _LEAST * context}: two chunks of {context} to "
            "calibrate on, and two to measure on; give a longer text, another one to measure on with --measure-text, "
            "or --no-measure"
        )
    kept = max(_LEAST, (chunks + _SHARE // 2) // _SHARE)
    return chunks - kept, kept
