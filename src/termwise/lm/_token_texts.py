"""The bytes of each token of a tokenizer, and pairs of special tokens with the same role."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from .._contract import contract

# Roles of tokens that a model predicts; not padding, unknown and mask tokens.
_ROLES = ("eos", "bos", "sep", "cls")
# Their names in published model families, for tokenizers without these attributes, and for ends of
# turns, which have none. The end of a turn comes first: it may also be the end of a text.
_NAMES = {
    "end of turn": (
        *("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>"),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "eos": (
        *("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|return|>"),
        *("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|END_OF_TEXT_TOKEN|>"),
    ),
    "bos": (
        *("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<BOS_TOKEN>"),
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    ),
}
_PADDING = ("<pad>", "[PAD]", "<|pad|>", "<unk>", "[UNK]", "[MASK]", "<mask>")
_SPACE = "\u2581"  # how SentencePiece writes it


@contract
def paired_special_tokens(student: object, teacher: object) -> dict[int, int]:
    """Pair special tokens of two tokenizers with the same role, such as the end of a turn.

    They are first paired by role: end of a turn, end of a text, beginning, separators. A
    transformers tokenizer has attributes for these roles (such as `eos_token_id`); ends of turns,
    and all roles of a `tokenizers.Tokenizer`, are recognized by their names in published model
    families. Then special tokens with equal text are paired. Padding, unknown and mask tokens are
    not paired, since no model is trained to predict them. Check the result: only the chat template
    defines which token ends an answer.

    Args:
        student: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
        teacher: the same for the teacher.

    Returns:
        {student token: teacher token}, for `special` of
        [`align_spans`][termwise.lm.align_spans] and
        [`VocabProjection.from_tokens`][termwise.lm.VocabProjection.from_tokens].

    Raises:
        ValueError: an argument is not such a tokenizer.
    """
    sides = [
        _special_tokens("paired_special_tokens", which, tokenizer)
        for which, tokenizer in (("student", student), ("teacher", teacher))
    ]
    roles = [
        _roles(tokenizer, side) for tokenizer, side in zip((student, teacher), sides, strict=True)
    ]
    pairs: dict[int, int] = {}
    for role in ("end of turn", *_ROLES):
        # If a family has no token for the end of a turn, it uses the end of a text.
        teachers = roles[1].get(role, roles[1].get("eos") if role == "end of turn" else None)
        if role in roles[0] and teachers is not None:
            pairs.setdefault(roles[0][role], teachers)
    played = [{*one.values()} for one in roles]
    padding = [
        {token for token in _padding(tokenizer, side) if token not in mine}
        for tokenizer, side, mine in zip((student, teacher), sides, played, strict=True)
    ]
    of_text = {text: token for token, text in sides[1].items() if token not in padding[1]}
    for token, text in sides[0].items():
        if text in of_text and token not in padding[0]:
            pairs.setdefault(token, of_text[text])
    return pairs


def token_texts(name: str, which: str, tokenizer: object) -> list[bytes | None]:
    """Return each token's bytes as they occur in a text; None for special and unused ids."""
    backend = _backend(name, which, tokenizer)
    read = _reader(name, which, backend)
    special = _special_tokens(name, which, tokenizer)
    added = {token: str(one.content) for token, one in _added(backend).items()}
    vocabulary = cast("Mapping[str, int]", backend.get_vocab(True))
    texts: list[bytes | None] = [None] * (1 + max(vocabulary.values(), default=-1))
    for text, token in vocabulary.items():
        if token not in special:
            texts[token] = added[token].encode() if token in added else read(text)
    return texts


def encoder(
    name: str, which: str, tokenizer: object, texts: Sequence[bytes | None]
) -> Callable[[Iterable[bytes]], dict[bytes, list[int]]]:
    """Return a function that tokenizes texts, if the tokens have exactly these bytes."""
    backend = _backend(name, which, tokenizer)

    def encode(asked: Iterable[bytes]) -> dict[bytes, list[int]]:
        readable = [(text, word) for text in asked if (word := _decoded(text)) is not None]
        encodings = backend.encode_batch([word for _, word in readable], add_special_tokens=False)
        written: dict[bytes, list[int]] = {}
        for (text, _), encoding in zip(readable, encodings, strict=True):
            used = zip(encoding.ids, encoding.attention_mask, strict=True)
            ids = [int(token) for token, is_used in used if is_used]
            parts = [texts[token] if token < len(texts) else None for token in ids]
            if b"".join(part or b"" for part in parts) == text and all(parts):
                written[text] = ids
        return written

    return encode


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _backend(name: str, which: str, tokenizer: object) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    needed = ("get_vocab", "get_added_tokens_decoder", "encode_batch", "decoder")
    if not all(hasattr(backend, part) for part in needed):
        raise ValueError(
            f"{name} needs a tokenizers.Tokenizer, or a fast tokenizer of transformers that holds "
            f"one, as the {which}'s, got {type(tokenizer).__name__}"
        )
    return backend


def _added(backend: Any) -> dict[int, Any]:
    return cast("dict[int, Any]", backend.get_added_tokens_decoder())


def _special_tokens(name: str, which: str, tokenizer: object) -> dict[int, str]:
    """Return the texts of special tokens: those of the backend, and of transformers."""
    backend = _backend(name, which, tokenizer)
    special = {token: str(one.content) for token, one in _added(backend).items() if one.special}
    for token in cast("Iterable[int]", getattr(tokenizer, "all_special_ids", ())):
        special.setdefault(int(token), str(backend.id_to_token(int(token))))
    return special


def _roles(tokenizer: object, special: Mapping[int, str]) -> dict[str, int]:
    ids = {text: token for token, text in special.items()}
    found: dict[str, int] = {}
    for role in _ROLES:
        token: object = getattr(tokenizer, f"{role}_token_id", None)
        if isinstance(token, int):
            found[role] = token
    for role, names in _NAMES.items():
        known = [ids[name] for name in names if name in ids]
        if known:
            found.setdefault(role, known[0])
    return found


def _padding(tokenizer: object, special: Mapping[int, str]) -> set[int]:
    declared = [getattr(tokenizer, f"{role}_token_id", None) for role in ("pad", "unk", "mask")]
    named = [token for token, text in special.items() if text in _PADDING]
    return {token for token in (*declared, *named) if isinstance(token, int)}


def _reader(name: str, which: str, backend: Any) -> Callable[[str], bytes]:
    """Return a function that decodes a token to bytes, according to the tokenizer's decoder."""
    config: dict[str, Any] = {"decoders": []}
    if backend.decoder is not None:
        config = json.loads(backend.decoder.__getstate__())
    steps = cast("list[dict[str, Any]]", config.get("decoders", [config]))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    spaces: list[str] = []
    for step in steps:
        if step["type"] == "Metaspace":
            spaces.append(step["replacement"])
        elif step["type"] == "Replace" and step["content"] == " ":
            spaces += [text for text in step["pattern"].values() if "String" in step["pattern"]]
    others = {*kinds} - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
    if len(spaces) != 1 or others:
        raise ValueError(
            f"{name} needs a tokenizer that writes bytes as GPT-2 does, or spaces as SentencePiece "
            f"does, as the {which}'s, got one with the decoder {' and '.join(kinds) or None}; pass "
            "the bytes of its tokens to VocabProjection.from_tokens"
        )
    return functools.partial(_with_spaces, spaces[0], "ByteFallback" in kinds)


def _with_spaces(space: str, byte_fallback: bool, token: str) -> bytes:
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(space, " ").encode()


def _byte_level(token: str) -> bytes:
    alphabet = _alphabet()
    if all(letter in alphabet for letter in token):
        return bytes(alphabet[letter] for letter in token)
    return token.encode()


@functools.cache
def _alphabet() -> dict[str, int]:
    """Return the byte of each letter of byte-level tokenizers.

    Printable bytes of Latin-1 are written as themselves, the others as the letters from 256 up.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return {**letters, **{chr(256 + place): byte for place, byte in enumerate(others)}}


def spelling(tokens: Iterable[str | bytes | None]) -> str | None:
    """Return how most tokens that begin a word write the preceding space. None: no token does."""
    marks = {" ": b" ", "\u0120": "\u0120".encode(), _SPACE: _SPACE.encode()}
    counts = dict.fromkeys(marks, 0)
    for token in tokens:
        if token:
            text = token.encode() if isinstance(token, str) else token
            for mark, start in marks.items():
                counts[mark] += text.startswith(start)
    most = max(counts, key=counts.__getitem__)
    return most if counts[most] else None
