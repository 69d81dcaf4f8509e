"""Projections and alignments of real tokenizers on a page of text in many scripts.

Two byte-level vocabularies are trained here. The vocabularies of two published families are read
where the packages that carry them are installed; the packages themselves are not imported.
"""

import base64
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from termwise.lm import (
    VocabProjection,
    align_spans,
    paired_special_tokens,
    vocab_partition,
)

PAGE = (
    "A student learns from a teacher that splits text differently.\n"
    "\tfor i in range(10):\n\t\tprint(f'{i:>3}')  # tabs\n"
    "Fran\u00e7ais: d\u00e9j\u00e0 vu, c\u0153ur. Deutsch: Stra\u00dfe, Gr\u00f6\u00dfe. Espa"
    "\u00f1ol: \u00bfqu\u00e9?\n"
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439: \u044d\u0442\u043e \u043f\u0440\u043e\u0432"
    "\u0435\u0440\u043a\u0430. \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac: \u03b4\u03bf"
    "\u03ba\u03b9\u03bc\u03ae.\n"
    "\u4e2d\u6587\uff1a\u5b66\u751f\u5411\u8001\u5e08\u5b66\u4e60\u3002\u65e5\u672c\u8a9e\uff1a"
    "\u3053\u308c\u306f\u8a66\u9a13\u3067\u3059\u3002\ud55c\uad6d\uc5b4: \uc2dc\ud5d8\n"
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629: \u0647\u0630\u0627 \u0627\u062e\u062a\u0628"
    "\u0627\u0631. \u05e2\u05d1\u05e8\u05d9\u05ea: \u05d1\u05d3\u05d9\u05e7\u05d4. \u0939\u093f"
    "\u0928\u094d\u0926\u0940: \u092a\u0930\u0940\u0915\u094d\u0937\u093e\n"
    "Emoji: \U0001f600 \U0001f469\u200d\U0001f4bb \U0001f1eb\U0001f1f7 \u2764\ufe0f na\u00efve "
    "e\u0301 (two code points) \U00010348\n"
    "x = {'a': [1, 2.5e-3, 0xFF]}; y = x['a'][-1] if x else None\r\n\n\n    the end    "
)


def trained(size, repeats):
    """A byte-level BPE of `tokenizers`, as demos and papers train them: offsets in characters."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra demo installs tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # Offsets that leave no space out.
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([PAGE[: len(PAGE) // 2]] * repeats, trainer)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [None if token == "<s>" else token for token, _ in vocabulary]
    return tokenizer, tokens


def test_trained_tokenizers_align_by_characters_and_every_text_is_equal():
    (large, large_tokens), (small, small_tokens) = trained(600, 3), trained(300, 3)
    encodings = [tokenizer.encode(PAGE) for tokenizer in (large, small)]
    assert large.decode(encodings[0].ids) == small.decode(encodings[1].ids) == PAGE
    offsets = [encoding.offsets for encoding in encodings]
    found = align_spans([offsets[0]], [offsets[1]]).check()
    check_chunks(found, PAGE, *offsets)
    assert found.max_chunks > 100

    def encode(token):  # in the alphabet of byte-level tokens, in which the tokens are given
        return [small.token_to_id(part) for part in _pieces(small, token)]

    for options in ({}, {"encode": encode}):
        projection = VocabProjection.from_tokens(large_tokens, small_tokens, **options)
        check_projection(projection, large_tokens, small_tokens)


def _pieces(tokenizer, token):
    return [piece.value for piece in tokenizer.model.tokenize(token)]


def metaspace(size, *special):
    """A BPE as SentencePiece makes it: spaces are letters, and bytes stand for what is rare."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra demo installs tokenizers")
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        limit_alphabet=60,
        special_tokens=["<unk>", "<s>", "</s>", *special],
        show_progress=False,
    )
    tokenizer.train_from_iterator([PAGE[: len(PAGE) // 2]] * 3, trainer)
    written = json.loads(tokenizer.to_str())
    written["model"]["byte_fallback"] = True
    vocabulary = written["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(written))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    assert tokenizer.decode(tokenizer.encode(PAGE).ids) == PAGE
    return tokenizer


def byte_level(size, *special):
    tokenizer, _ = trained(size, 3)
    tokenizer.add_special_tokens([*special])
    tokenizer.add_tokens(["<think>"])  # which is text, and written as such
    return tokenizer


def said(tokenizer, token):
    """What a token adds to a text, by the tokenizer's own decoder."""
    before = tokenizer.encode("a").ids
    return tokenizer.decode([*before, token], skip_special_tokens=False)[1:]


@pytest.mark.parametrize("student_is", ["byte_level", "metaspace"])
def test_tokenizers_of_two_kinds_are_read_as_bytes(student_is):
    sides = [byte_level(500, "<|endoftext|>", "<|im_end|>"), metaspace(400, "<end_of_turn>")]
    if student_is == "metaspace":
        sides.reverse()
    student, teacher = sides
    projection = VocabProjection.from_tokenizers(student, teacher)
    assert projection.student_vocab == student.get_vocab_size()
    indices, weights = projection.to_topk()
    sizes = [len(set(tokenizer.get_vocab())) for tokenizer in sides]
    assert [projection.student_vocab, projection.teacher_vocab] == sizes
    special = [
        {i for i, one in tokenizer.get_added_tokens_decoder().items() if one.special}
        for tokenizer in sides
    ]
    ids = {said(teacher, token): token for token in reversed(range(sizes[1]))}
    equal = written = 0
    for token in range(sizes[0]):
        text = said(student, token)
        if token in special[0] or "\ufffd" in text:
            continue
        row = indices[token][indices[token] >= 0].tolist()
        if text in ids and ids[text] not in special[1] and len(row) == 1:
            assert said(teacher, row[0]) == text
            assert weights[token, 0] == 1
            equal += 1
        else:
            assert teacher.decode([*teacher.encode("a").ids, *row])[1:].startswith(text[:1])
            written += 1
    assert equal > 150
    assert written > 50
    by_name = [tokenizer.get_vocab() for tokenizer in sides]
    for role in (("<|im_end|>", "<end_of_turn>"), ("<|endoftext|>", "</s>"), ("<s>", "<s>")):
        one, other = role if student_is == "byte_level" else role[::-1]
        token = by_name[0][one]
        assert indices[token, 0] == by_name[1][other]
        assert weights[token].tolist() == [1.0] + [0.0] * (weights.shape[1] - 1)


def test_every_byte_is_found_in_both_alphabets():
    from termwise.lm._token_texts import token_texts

    for tokenizer in (byte_level(300), metaspace(300)):
        texts = token_texts("this", "student", tokenizer)
        assert {bytes([byte]) for byte in range(256)} <= {*texts}
        assert sum(text is None for text in texts) == sum(
            one.special for one in tokenizer.get_added_tokens_decoder().values()
        )


class Fast:
    """What is read of a fast tokenizer of transformers."""

    def __init__(self, backend, **roles):
        self.backend_tokenizer = backend
        ids = {name: backend.token_to_id(token) for name, token in roles.items()}
        self.all_special_ids = [*ids.values()]
        for name, token in ids.items():
            setattr(self, f"{name}_token_id", token)


def test_roles_that_a_tokenizer_tells_come_first_and_padding_is_none():
    backend = byte_level(300, "<|endoftext|>", "<|stop|>")
    student = Fast(backend, eos="<|stop|>", pad="<|endoftext|>")
    teacher = Fast(metaspace(300, "<pad>", "<|stop|>"), eos="</s>", bos="<s>", pad="<pad>")
    names = [backend.id_to_token, teacher.backend_tokenizer.id_to_token]
    found = paired_special_tokens(student, teacher)
    assert {names[0](one): names[1](other) for one, other in found.items()} == {
        "<|stop|>": "</s>",
        "<s>": "<s>",
    }
    projection = VocabProjection.from_tokenizers(student, teacher)
    indices, _ = projection.to_topk()
    assert indices[student.eos_token_id, 0] == teacher.eos_token_id
    assert (indices[student.pad_token_id] == -1).all()
    chosen = VocabProjection.from_tokenizers(
        student, teacher, special={student.pad_token_id: 2}, student_vocab=512
    )
    assert chosen.student_vocab == 512
    assert chosen.to_topk()[0][student.pad_token_id, 0] == 2


def test_other_tokenizers_are_refused_with_what_to_write():
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    pieces = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}))
    pieces.decoder = tokenizers.decoders.WordPiece()
    for wrong, got in ((plain, "None"), (pieces, "WordPiece")):
        with pytest.raises(ValueError, match=f"as the student's, got one with the decoder {got};"):
            VocabProjection.from_tokenizers(wrong, byte_level(300))
    with pytest.raises(ValueError, match=r"a tokenizers.Tokenizer, .* as the teacher's, got str"):
        VocabProjection.from_tokenizers(byte_level(300), "gpt2")
    with pytest.raises(ValueError, match="^paired_special_tokens needs a tokenizers.Tokenizer"):
        paired_special_tokens(None, None)


def test_strings_of_two_kinds_are_refused_and_of_one_are_not():
    sides = [byte_level(400), metaspace(400)]
    names = [[tokenizer.id_to_token(i) for i in range(300)] for tokenizer in sides]
    with pytest.raises(ValueError, match="write a space in one way, got '\u0120' .* and '\u2581'"):
        VocabProjection.from_tokens(*names)
    with pytest.raises(ValueError, match="got '\u2581' in most of the student's and ' ' in most"):
        VocabProjection.from_tokens(names[1], [b" the", b"the"])
    for one in names:
        VocabProjection.from_tokens(one, one)


def check_chunks(found, text, student, teacher):
    """Every chunk is the same text on both sides, and the chunks are the text."""
    assert found.pair_valid.all()
    assert found.pair_exact.all()
    whole = text[:0]
    for chunk in range(found.max_chunks):
        texts = []
        for ids, offsets in (
            (found.student_chunk_id[0], student),
            (found.teacher_chunk_id[0], teacher),
        ):
            spans = [offsets[i] for i in ids.eq(chunk).nonzero()[:, 0].tolist()]
            texts.append(text[min(start for start, _ in spans) : max(stop for _, stop in spans)])
        assert texts[0] == texts[1]
        whole += texts[0]
    assert whole == text


def check_projection(projection, student_tokens, teacher_tokens):
    """Rows sum to 1; equal texts are one entry; others begin with their first teacher token."""
    rows = torch.arange(projection.student_vocab).repeat_interleave(
        projection.student_pointers.diff()
    )
    sums = torch.zeros(projection.student_vocab).index_add(0, rows, projection.student_weights)
    held = torch.tensor([bool(token) for token in student_tokens]).float()
    torch.testing.assert_close(sums, held, rtol=1e-6, atol=1e-6)
    teacher_ids = {}
    for token, text in enumerate(teacher_tokens):
        if text:
            teacher_ids.setdefault(text, token)
    pointers = projection.student_pointers.tolist()
    columns = projection.student_columns.tolist()
    weights = projection.student_weights.tolist()
    for token, text in enumerate(student_tokens):
        row = range(pointers[token], pointers[token + 1])
        if not text:
            assert not row
        elif text in teacher_ids:
            assert [columns[i] for i in row] == [teacher_ids[text]]
            assert weights[row[0]] == 1
        else:
            first = max(row, key=weights.__getitem__)
            assert weights[first] >= 0.9 - 1e-6
            assert text.startswith(teacher_tokens[columns[first]])


def packaged(package, *parts):
    """The path of a file that a package carries, found without importing it."""
    found = importlib.util.find_spec(package)
    path = Path(found.submodule_search_locations[0], *parts) if found else None
    if path is None or not path.exists():
        pytest.skip(f"needs {parts[-1]}, which the package {package} carries")
    return path


def tekken():
    path = packaged("mistral_common", "data", "tekken_240911.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    specials = data["config"]["default_num_special_tokens"]
    count = data["config"]["default_vocab_size"] - specials
    tokens = [base64.b64decode(token["token_bytes"]) for token in data["vocab"][:count]]
    return tokens, data["config"]["pattern"]


def qwen():
    path = packaged("dashscope", "resources", "qwen.tiktoken")
    tokens = [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()]
    return tokens, (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def test_tekken_and_qwen():
    tiktoken = pytest.importorskip("tiktoken", reason="it reads these vocabularies")
    sides = []
    for name, (tokens, pattern) in (("student", tekken()), ("teacher", qwen())):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        sides.append((tokens, encoding))
    (student_tokens, _), (teacher_tokens, _) = sides
    page = PAGE.encode()
    offsets = [_byte_offsets(tokens, encoding.encode(PAGE)) for tokens, encoding in sides]
    found = align_spans([offsets[0]], [offsets[1]]).check()
    check_chunks(found, page, *offsets)
    assert found.max_chunks > 150

    projection = VocabProjection.from_tokens(student_tokens, teacher_tokens)
    check_projection(projection, student_tokens, teacher_tokens)
    partition = vocab_partition(projection, rule="strict")
    pairs = zip(partition.common_student.tolist(), partition.common_teacher.tolist(), strict=True)
    assert all(student_tokens[s] == teacher_tokens[t] for s, t in pairs)
    assert len(partition.common_student) == len({*student_tokens} & {*teacher_tokens})


def _byte_offsets(tokens, ids):
    offsets, start = [], 0
    for token in ids:
        offsets.append((start, start + len(tokens[token])))
        start = offsets[-1][1]
    return offsets
