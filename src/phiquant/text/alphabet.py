"""The byte alphabet of GPT-2: one printable character for each byte, in which byte-level vocabularies are written.

The bytes 21 to 7E, A1 to AC and AE to FF are the characters of the same number; the other 68, in ascending order, are
U+0100, U+0101 and so on, so that a space is U+0120 and a newline U+010A.
"""

from __future__ import annotations

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

CHARACTERS = {**{byte: chr(byte) for byte in _PRINTABLE}, **{byte: chr(256 + at) for at, byte in enumerate(_OTHERS)}}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def spell(data: bytes) -> str:
    """Bytes in the alphabet, a character for each."""
    return "".join([CHARACTERS[byte] for byte in data])


def read(text: str) -> bytes | None:
    """The bytes that `text` spells; None if it has a character outside the alphabet."""
    try:
        return bytes([BYTES[character] for character in text])
    except KeyError:
        return None
