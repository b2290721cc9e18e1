"""The keys `tokenizer.*`: tokens, scores or merges, types, special ids, chat templates.

A vocabulary is SentencePiece's (`vocabulary_pieces.py`) or byte-level (`vocabulary_bpe.py`). In both, ids without a
piece are filled with `[PADi]` of type UNUSED, and added tokens overwrite pieces, as in llama.cpp's converter.
"""

from collections.abc import Mapping

import numpy as np

from phiquant.convert.checkpoint import read_json
from phiquant.convert.dummies import dummy_tokens
from phiquant.convert.entries import Entry, boolean, string, strings, uint32
from phiquant.convert.templates import chat_templates, template_keys
from phiquant.convert.tokenizer_files import ADDED_SCORE, Pieces, TokenizerFiles, ids_of, steps_of
from phiquant.convert.vocabulary_bpe import added_by_class, from_bytes, is_byte_level
from phiquant.convert.vocabulary_pieces import from_pieces
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.gguf import ValueType, keys
from phiquant.text import AddedToken, TokenType, added_tokens_from_hf, added_tokens_to_json, alphabet, pretokenizers

__all__ = ["TokenizerFiles", "strips_whitespace", "tokenizer_keys"]


_SPECIALS = {  # Hugging Face's names, in written order
    "bos": keys.BOS_ID,
    "eos": keys.EOS_ID,
    "unk": keys.UNKNOWN_ID,
    "sep": keys.SEPARATOR_ID,
    "pad": keys.PADDING_ID,
    "cls": keys.CLS_ID,
    "mask": keys.MASK_ID,
}
_FLAGS = {"bos": keys.ADD_BOS, "eos": keys.ADD_EOS}
_TURN_ENDS = ("<|end|>", "<|im_end|>")


def tokenizer_keys(files: TokenizerFiles, vocab_size: int) -> list[Entry]:
    """Every key `tokenizer.*`, then those of our own for what GGUF has no key.

    CheckpointError where the checkpoint's files contradict each other or the model, UnsupportedError for a tokenizer
    that is well-formed but none of Phi's.
    """
    pieces = (from_bytes if is_byte_level(files) else from_pieces)(files, vocab_size)
    sources = _added_tokens(files, vocab_size)
    added = [token for token, _ in sources]
    for token, source in sources:
        _put_added(pieces, token, source)
    by_text = {token.content: token.id for token in added}
    if pieces.merges is not None:
        by_text = {**{text: i for i, text in enumerate(pieces.texts)}, **by_text}
    special = _special_ids(files, by_text, pieces)
    if pieces.merges is not None:
        added = _with_unlisted(added, pieces, special)
    for index in dummy_tokens(files.config, vocab_size):
        pieces.types[index] = TokenType.UNUSED
    ends = _end_ids(files, vocab_size)
    entries = [
        *_vocabulary_keys(pieces),
        *_special_keys(files, special, pieces, ends),
        *template_keys(chat_templates(files.directory, files.tokenizer_config)),
    ]
    if added:
        entries.append(string(keys.ADDED_TOKENS, added_tokens_to_json(added)))
    if ends:
        entries.append(Entry(keys.END_IDS, ValueType.ARRAY, np.array(ends, np.uint32), ValueType.UINT32))
    if pieces.ignore_merges:
        entries.append(boolean(keys.IGNORE_MERGES, True))
    return entries


def strips_whitespace(files: TokenizerFiles) -> bool:
    """Whether the tokens of a chat swallow the whitespace that follows them in the way of Phi-3's vocabulary."""
    added = added_tokens_from_hf(files.tokenizer_config, files.tokenizer)
    strips = any(token.rstrip and token.special and token.content.startswith("<|") for token in added)
    return strips and not is_byte_level(files)


def _vocabulary_keys(pieces: Pieces) -> list[Entry]:
    types = Entry(keys.TOKEN_TYPE, ValueType.ARRAY, np.array(pieces.types, np.int32), ValueType.INT32)
    if pieces.merges is None:
        return [
            string(keys.TOKENIZER_MODEL, "llama"),
            string(keys.TOKENIZER_PRE, "default"),
            strings(keys.TOKENS, pieces.texts),
            Entry(keys.SCORES, ValueType.ARRAY, np.array(pieces.scores, np.float32), ValueType.FLOAT32),
            types,
        ]
    words = pieces.words
    pre = pretokenizers.recognize(pieces.texts) if words is None else pretokenizers.id_of(words, pieces.texts)
    if pre is None:
        raise UnsupportedError(
            "vocab.json and merges.txt do not say how text is cut into words, and the vocabulary is not a known one; "
            "add tokenizer.json (in transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…))."
        )
    return [
        string(keys.TOKENIZER_MODEL, "gpt2"),
        string(keys.TOKENIZER_PRE, pre),
        strings(keys.TOKENS, pieces.texts),
        types,
        strings(keys.MERGES, pieces.merges),
    ]


def _added_tokens(files: TokenizerFiles, vocab_size: int) -> list[tuple[AddedToken, str]]:
    """Added tokens by id, each with what says its attributes: of several files tokenizer.json, which is what runs.

    CheckpointError where files, or one of them alone, give an id two texts or a text two ids.
    """
    listed = ids_of(read_json(files.directory / "added_tokens.json") or {}, "added_tokens.json")
    sources = {
        # Ids that the model does not have are ignored by llama.cpp, too.
        "added_tokens.json": [AddedToken(index, text) for text, index in listed.items() if index < vocab_size],
        "tokenizer_config.json": added_tokens_from_hf(files.tokenizer_config, None),
        "tokenizer.json": added_tokens_from_hf({}, files.tokenizer),
    }
    ids: dict[str, tuple[int, str]] = {}
    found: dict[int, tuple[AddedToken, str]] = {}
    for source, tokens in sources.items():
        for token in tokens:
            index, first = ids.setdefault(token.content, (token.id, source))
            if index != token.id:
                raise CheckpointError(
                    f"{first} gives token {token.content!r} the id {index}, {source} {token.id}; "
                    "take both from the same repository."
                )
            other, first = found.get(token.id, (token, source))
            if other.content != token.content:
                raise CheckpointError(
                    f"{first} names token {token.id} {other.content!r}, {source} {token.content!r}; "
                    "take both from the same repository."
                )
            found[token.id] = token, source
    for token in added_by_class(files):
        if token.id not in found or found[token.id][1] == "added_tokens.json":  # which has no attributes
            found[token.id] = token, files.tokenizer_class
    return [found[index] for index in sorted(found)]


def _put_added(pieces: Pieces, token: AddedToken, source: str) -> None:
    """Overwrite an id by an added token.

    In a byte-level vocabulary it must not have been what a merge makes, or a byte: words could not be spelled then. As
    in llama.cpp's converter, what looks like a mark of a chat is a control token there, whether it is special or not.
    """
    looks_special = token.content.startswith("<|") and token.content.endswith("|>")
    control = token.special or (pieces.merges is not None and looks_special)
    if pieces.merges is not None and 0 <= token.id < len(pieces.texts):
        text = pieces.texts[token.id]
        if pieces.types[token.id] is TokenType.NORMAL and text not in (
            token.content,
            alphabet.spell(token.content.encode()),
        ):
            raise CheckpointError(
                f"{source} gives token {token.content!r} the id {token.id}, which the vocabulary gives {text!r}; "
                "take both from the same repository."
            )
    pieces.put(token.id, token.content, ADDED_SCORE, TokenType.CONTROL if control else TokenType.USER_DEFINED, source)


def _with_unlisted(added: list[AddedToken], pieces: Pieces, special: Mapping[str, int]) -> list[AddedToken]:
    """Old byte-level checkpoints list no added tokens: what begins or ends a text is one all the same, if no word."""
    made = {merge.replace(" ", "", 1) for merge in pieces.merges or ()} | alphabet.BYTES.keys()
    unlisted = {special[name] for name in ("bos", "eos") if name in special} - {token.id for token in added}
    for index in [index for index in unlisted if pieces.texts[index] not in made]:
        pieces.types[index] = TokenType.CONTROL
        added = [*added, AddedToken(index, pieces.texts[index], special=True)]
    return sorted(added, key=lambda token: token.id)


def _special_ids(files: TokenizerFiles, by_text: Mapping[str, int], pieces: Pieces) -> dict[str, int]:
    """The id of each special token by Hugging Face's name for it: by its text, else by config.json."""
    ids: dict[str, int] = {}
    for name in _SPECIALS:
        text = files.tokenizer_config.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        found = by_text.get(text) if isinstance(text, str) else None
        if found is None:
            found = files.config.get(f"{name}_token_id")
        if isinstance(found, list) and found:  # several ends of turn: the first is the end of text
            found = found[0]
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(pieces.texts):
            ids[name] = found
    return ids


def _special_keys(files: TokenizerFiles, ids: Mapping[str, int], pieces: Pieces, ends: list[int]) -> list[Entry]:
    config = files.tokenizer_config
    entries = [uint32(_SPECIALS[name], value) for name, value in ids.items()]
    turn_ends = sorted((i for i in ends if i != ids.get("eos")), key=lambda i: pieces.texts[i] not in _TURN_ENDS)
    if turn_ends:
        entries.append(uint32(keys.EOT_ID, turn_ends[0]))
    flags = {
        name: config[f"add_{name}_token"]
        for name in ("bos", "eos")
        if isinstance(config.get(f"add_{name}_token"), bool)
    }
    flags |= _post_processor_flags(files)
    return entries + [boolean(_FLAGS[name], value) for name, value in flags.items()]


def _post_processor_flags(files: TokenizerFiles) -> dict[str, bool]:
    """Whether tokenizer.json's post-processor puts bos first or eos last; it overrules tokenizer_config.json."""
    flags: dict[str, bool] = {}
    for processor in steps_of(files.tokenizer.get("post_processor")):
        if processor.get("type") == "ByteLevel":
            flags = {"bos": False, "eos": False} | flags
        single = processor.get("single")
        if processor.get("type") != "TemplateProcessing" or not isinstance(single, list) or len(single) < 2:
            continue
        for name, item in (("bos", single[0]), ("eos", single[-1])):
            special = item.get("SpecialToken") if isinstance(item, dict) else None
            if isinstance(special, dict):
                text = files.tokenizer_config.get(f"{name}_token")
                flags[name] = special.get("id") == (text.get("content") if isinstance(text, dict) else text)
    return flags


def _end_ids(files: TokenizerFiles, vocab_size: int) -> list[int]:
    """The ids that end a turn by generation_config.json (one or a list), else by config.json."""
    value = files.generation.get("eos_token_id", files.config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"generation_config.json or config.json: eos_token_id {index!r} is not an id below {vocab_size}."
            )
    return list(dict.fromkeys(ids))
