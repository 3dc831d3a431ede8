"""Dictionaries on disk: what is kept, what is counted, what is refused."""

from __future__ import annotations

import pytest

from bagformer.bags import BagSegmenter

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", *"红色连衣裙手机壳", "nike", "鞋"]


class Letters:
    """The least that a tokenizer may be: characters, and ``nike`` as one."""

    unk_token, unk_token_id = "[UNK]", 1

    def tokenize(self, text):
        return text.strip().replace("nike", "\0").replace("\0", "N")

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, str) and tokens in VOCABULARY:
            return VOCABULARY.index(tokens)
        if isinstance(tokens, str) and len(tokens) > 1 and tokens.startswith("["):
            return 1
        ids = ["nike" if token == "N" else token for token in tokens]
        return [VOCABULARY.index(t) if t in VOCABULARY else 1 for t in ids]


class Callable(Letters):
    """The same behind a call, as transformers has it."""

    def __call__(self, texts, add_special_tokens=True, **_):
        special = [2] if add_special_tokens else []
        return {
            "input_ids": [special + self.convert_tokens_to_ids(self.tokenize(t)) for t in texts]
        }


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "entities.txt"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write


TEXT = "红色\n连衣裙\n\n红色\nnike\nnike鞋\n裙€\n \n手机壳\n手机"


@pytest.mark.parametrize("tokenizer", [Letters(), Callable()], ids=["tokenize", "call"])
def test_report(write, tokenizer):
    path = write(TEXT)
    segmenter = BagSegmenter.from_dictionary(path, tokenizer)
    report = segmenter.report
    assert report.lines == 10 and report.kept == len(segmenter) == 6
    assert (report.blank, report.duplicates, report.single, report.longest) == (2, 1, 1, 3)
    assert (report.unknown, report.unknown_dropped, report.malformed) == (1, 1, 0)
    assert report.lines == report.blank + report.unknown_dropped + report.duplicates + report.kept
    assert segmenter.masked_ids == (0, 2)
    ids = [[2, *tokenizer.convert_tokens_to_ids(list("红色连衣裙手机€"))]]
    assert segmenter(ids).spans(0) == [(0, 1), (1, 3), (3, 6), (6, 8), (8, 9)]
    assert str(report).splitlines()[:3] == [
        f"{path} for leftmost_longest",
        "  lines              10",
        "  kept                6  distinct entries, longest 3 tokens",
    ]
    assert "unreachable" not in str(report)


def test_the_original_keeps_unknown_tokens_and_counts_what_it_cannot_reach(write):
    segmenter = BagSegmenter.from_dictionary(write(TEXT), Letters(), "original")
    report = segmenter.report
    assert (report.kept, report.unknown, report.unknown_dropped) == (7, 1, 0)
    assert report.unreachable == 1, "连衣 is no entry, so 连衣裙 is never found; 手机壳 is"
    assert "unreachable" in str(report)
    any_unknown = [[2, *Letters().convert_tokens_to_ids(list("裙¥红"))]]
    assert segmenter(any_unknown).spans(0) == [(0, 1), (1, 3), (3, 4)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_mark(write, end):
    text = "\ufeff红色" + end + "连衣裙" + end
    segmenter = BagSegmenter.from_dictionary(write(text), Letters())
    assert (segmenter.report.lines, len(segmenter), segmenter.report.unknown) == (2, 2, 0)


def test_an_empty_file(write):
    segmenter = BagSegmenter.from_dictionary(write(""), Letters())
    assert len(segmenter) == segmenter.report.lines == 0


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"\xe7\xba", "line 3: not UTF-8 .unexpected end of data at byte 0"),
        (b"a\xff", "line 3: not UTF-8 .invalid start byte at byte 1"),
        (b"\x00\x41", "line 3: holds a NUL byte"),
        (b"a" * 65537, "line 3: more than 65536 bytes"),
        (b"a" * 500_000, "line 3: more than 65536 bytes"),
    ],
    ids=["cut character", "invalid byte", "NUL", "one byte too long", "absurd"],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_malformed_lines(write, line, text, end):
    tail = end + "手机".encode() if end else b""
    path = write("红色\n\n".encode() + line + tail)
    with pytest.raises(ValueError, match=text) as caught:
        BagSegmenter.from_dictionary(path, Letters())
    assert str(caught.value).startswith(f"{path}, line 3")
    report = BagSegmenter.from_dictionary(path, Letters(), on_error="skip").report
    assert (report.malformed, report.blank, report.kept) == (1, 1, 2 if end else 1)


def test_the_longest_line_allowed(write):
    report = BagSegmenter.from_dictionary(write(b"a" * 65536 + b"\n"), Letters()).report
    assert (report.malformed, report.unknown) == (0, 1)


def test_long_entries_are_counted_and_kept(write):
    text = "红" * 26 + "\n" + "红" * 25
    report = BagSegmenter.from_dictionary(write(text), Letters()).report
    assert (report.long, report.longest, report.kept) == (1, 26, 2)


def test_more_lines_than_are_tokenised_at_once(write):
    letters = "红色连衣裙手机壳"
    lines = [a + b + c + d + e for a in letters for b in letters for c in letters
             for d in letters for e in letters]  # fmt: skip
    report = BagSegmenter.from_dictionary(write("\n".join(lines)), Letters()).report
    assert report.kept == report.lines == 8**5 > 3 * 8192


def test_bad_arguments(write):
    path = write("红色")
    with pytest.raises(ValueError, match=r"'\[FOO\]' is not in the tokenizer's vocabulary"):
        BagSegmenter.from_dictionary(path, Letters(), masked_tokens=["[FOO]"])
    assert BagSegmenter.from_dictionary(path, Letters(), masked_tokens=["[UNK]"]).masked_ids == (1,)
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        BagSegmenter.from_dictionary(path, Letters(), on_error="ignore")
    with pytest.raises(ValueError, match="matcher must be one of"):
        BagSegmenter.from_dictionary(path, Letters(), "greedy")
    with pytest.raises(FileNotFoundError):
        BagSegmenter.from_dictionary(path.with_name("missing"), Letters())


def test_a_transformers_tokenizer_normalises_entries_as_it_does_texts(tmp_path, write):
    from transformers import BertTokenizer

    vocabulary = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "nike", "鞋", "##s"]
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
    segmenter = BagSegmenter.from_dictionary(write("Nike 鞋\nNIKES\n"), tokenizer)
    ids = tokenizer(["nike鞋 nikes"])["input_ids"]
    assert [tokenizer.decode(ids[0][a:b]) for a, b in segmenter(ids).spans(0)][1] == "nike 鞋"
    assert segmenter(ids).spans(0) == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert segmenter(ids).mask.tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(
    "matcher,note",
    [
        ("leftmost_longest", "no effect on bags"),
        ("original", "matters at token 0 alone"),
        ("backward_max", "a span of its own"),
    ],
)
def test_what_single_tokens_do_is_said_as_it_is(write, matcher, note):
    with_single = BagSegmenter.from_dictionary(write("nike鞋\nnike"), Letters(), matcher)
    assert f"one token, {note}" in str(with_single.report)
    without = BagSegmenter.from_dictionary(write("nike鞋"), Letters(), matcher)
    nike, shoe = VOCABULARY.index("nike"), VOCABULARY.index("鞋")
    for ids, matters in (([nike, shoe, 2], "original"), ([2, nike, nike], "backward_max")):
        differs = with_single([ids]).spans(0) != without([ids]).spans(0)
        assert differs == (matcher == matters)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("shift", range(4))
def test_no_line_is_lost_at_the_edges_of_blocks(write, end, shift):
    lines = [b"nike" * (1 + k % 3) for k in range(20_000)]
    report = BagSegmenter.from_dictionary(write(b"n" * shift + end.join(lines)), Letters()).report
    assert report.lines == len(lines)
    assert report.lines == report.unknown_dropped + report.duplicates + report.kept


@pytest.mark.parametrize("tail", [b"\n", b"\nnike", b""])
def test_a_long_line_is_not_cut_at_a_carriage_return(write, tail):
    path = write(b"n" * 65536 + b"\r" + "红色".encode() * 9 + tail)
    with_long = BagSegmenter.from_dictionary(path, Letters(), "original")
    assert with_long.report.lines == 2 + tail.endswith(b"nike") and with_long.report.long == 1
    with pytest.raises(ValueError, match="line 1: more than 65536 bytes"):
        BagSegmenter.from_dictionary(write(b"n" * 65537 + b"\r" + tail), Letters())


class NoUnknown(Letters):
    """A tokenizer without an unknown token: None for what it does not know."""

    unk_token = unk_token_id = None

    def convert_tokens_to_ids(self, tokens):
        return [None if token == "x" else 5 for token in tokens]


def test_tokenizers_that_are_none_or_know_no_id(write):
    path = write("红\nx\n")
    with pytest.raises(TypeError, match=r"^tokenizer must have tokenize and .* got int"):
        BagSegmenter.from_dictionary(path, 5, masked_tokens=())
    with pytest.raises(TypeError, match=r"^tokenizer must have tokenize and .* got function"):
        BagSegmenter.from_dictionary(path, lambda lines: {})
    with pytest.raises(ValueError, match=r"entities.txt: the tokenizer gives .* up to 2 no int id"):
        BagSegmenter.from_dictionary(path, NoUnknown(), masked_tokens=())
