"""Text: no token is lost or doubled however it is packed, batched, sharded or resumed; bad text is told clearly."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from actome.core import documents
from actome.core.errors import TextError
from actome.core.text import Text, encode

SAMPLE = """The quick brown fox jumps over the lazy dog. A record is made of tokens, and tokens are made of text.
def main(argv):
    return 0 if argv else 1
""".splitlines(keepends=True)


def tokenizer_of(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens; `template` is what it puts around a text, such as ``"<b> $A"``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = ["<e>", "<b>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SAMPLE,
        trainers.BpeTrainer(vocab_size=300, special_tokens=words, initial_alphabet=alphabet, show_progress=False),
    )
    if template:
        bpe.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(word, words.index(word)) for word in words]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


PLAIN = tokenizer_of(eos_token="<e>", bos_token="<b>")  # names a BOS and does not use it, like GPT-2
LLAMA = tokenizer_of("<b> $A", eos_token="<e>", bos_token="<b>")
BERT = tokenizer_of("<b> $A <s>", cls_token="<b>", sep_token="<s>", pad_token="<e>")
EOS, BOS, SEP = 0, 1, 2


def ids_of(text: str) -> list[int]:
    return PLAIN(text, add_special_tokens=False)["input_ids"]


def rows_of(text: Text) -> list[tuple[int, list[int], str]]:
    """(number, real tokens, source) of every row."""
    rows = []
    for batch in text:
        assert batch.ids.dtype == torch.int64
        mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
        assert batch.mask is None or not batch.mask.all(), "a batch without padding has no mask"
        assert batch.n_tokens == int(mask.sum())
        for ids, real, name, number in zip(batch.ids, mask, batch.source, batch.sequence, strict=True):
            length = int(real.sum())
            assert real[:length].all(), "padding is on the right"
            rows.append((number, ids[:length].tolist(), name))
    return rows


some_texts = st.lists(st.text(max_size=60), min_size=1, max_size=8).filter(lambda texts: any(t.strip() for t in texts))


@settings(max_examples=60, deadline=None)
@given(some_texts, st.integers(4, 20), st.integers(1, 4), st.sampled_from([PLAIN, LLAMA, BERT]))
def test_packing_loses_no_token(texts, context, batch_size, tokenizer):
    rows = rows_of(Text(texts, tokenizer, context=context, batch_size=batch_size))
    before, after, between = {
        id(PLAIN): ([], [], [EOS]),
        id(LLAMA): ([BOS], [], [EOS]),
        id(BERT): ([BOS], [SEP], [SEP]),
    }[id(tokenizer)]
    contents = []
    for _, ids, _ in rows:
        assert ids[: len(before)] == before
        assert ids[len(ids) - len(after) :] == after
        contents += ids[len(before) : len(ids) - len(after)]
    expected = []
    for text in texts:
        if text.strip():
            expected += (between if expected else []) + ids_of(text)
    assert contents == expected
    assert [number for number, _, _ in rows] == list(range(len(rows)))
    assert all(len(ids) == context for _, ids, _ in rows[:-1]), "every row but the last is full"


@settings(max_examples=40, deadline=None)
@given(some_texts, st.integers(2, 12), st.integers(1, 4))
def test_unpacked_rows_are_the_documents_in_order(texts, context, batch_size):
    rows = rows_of(Text(texts, PLAIN, context=context, batch_size=batch_size, pack=False))
    joined: dict[str, list[int]] = {}
    for _, ids, name in rows:
        assert 0 < len(ids) <= context
        joined.setdefault(name, []).extend(ids)
    assert joined == {f"#{i}": ids_of(text) for i, text in enumerate(texts) if text.strip()}


@settings(max_examples=40, deadline=None)
@given(some_texts, st.integers(0, 12), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_resumed_and_sharded_rows_are_those_of_the_whole(texts, skip, count, size, other_size, pack):
    whole = rows_of(Text(texts, PLAIN, context=5, batch_size=size, pack=pack))
    text = Text(texts, PLAIN, context=5, batch_size=other_size, pack=pack)
    assert rows_of(text.skip(skip)) == whole[skip:]
    shards = [rows_of(text.shard(index, count)) for index in range(count)]
    assert sorted(itertools.chain(*shards)) == whole
    assert rows_of(text.shard(0, count).skip(skip)) == shards[0][skip:]


@settings(max_examples=40, deadline=None)
@given(some_texts, st.integers(2, 40), st.sampled_from([PLAIN, LLAMA]), st.booleans())
def test_limit_ends_the_text_there(texts, limit, tokenizer, pack):
    whole = rows_of(Text(texts, tokenizer, context=6, pack=pack))
    text = Text(texts, tokenizer, context=6, pack=pack, limit=limit)
    rows = rows_of(text)
    total = sum(len(ids) for _, ids, _ in whole)
    kept = sum(len(ids) for _, ids, _ in rows)
    # A row that would hold a BOS and nothing else is left out.
    assert min(limit, total) - (tokenizer is LLAMA) <= kept <= min(limit, total)
    assert [ids for _, ids, _ in rows[:-1]] == [ids for _, ids, _ in whole[: len(rows) - 1]]
    assert whole[len(rows) - 1][1][: len(rows[-1][1])] == rows[-1][1]
    assert text.describe()["counts"]["tokens"] == kept


def test_special_tokens_are_those_of_the_tokenizer_unless_told():
    def first_row(tokenizer, **options):
        return next(iter(Text(["The fox"], tokenizer, context=32, **options))).ids[0].tolist()

    bare = ids_of("The fox")
    assert first_row(PLAIN) == bare, "it names a BOS, and does not use it"
    assert first_row(PLAIN, bos=True) == [BOS, *bare]
    assert first_row(LLAMA) == first_row(LLAMA, bos=True) == [BOS, *bare]
    assert first_row(LLAMA, bos=False) == bare
    assert first_row(BERT, pack=False) == BERT("The fox")["input_ids"] == [BOS, *bare, SEP]
    with pytest.raises(TextError, match="neither a BOS nor a CLS"):
        Text(["x"], tokenizer_of(eos_token="<e>"), bos=True)


def test_overlong_documents_are_split_truncated_or_refused():
    texts = [("short", "a fox"), ("long", SAMPLE[0])]
    length = len(ids_of(SAMPLE[0]))
    split = Text(texts, PLAIN, context=10, pack=False)
    assert sum(len(ids) for _, ids, name in rows_of(split) if name == "long") == length
    assert split.describe()["counts"]["split"] == 1
    cut = Text(texts, PLAIN, context=10, pack=False, overlong="truncate")
    assert [name for _, _, name in rows_of(cut)] == ["short", "long"]
    counts = cut.describe()["counts"]
    assert (counts["truncated"], counts["dropped"]) == (1, length - 10)
    with pytest.raises(TextError, match=rf"'long' has {length} tokens .* room for 10 .*overlong='split'"):
        rows_of(Text(texts, PLAIN, context=10, pack=False, overlong="error"))


def test_it_streams():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield SAMPLE[0]

    batches = iter(Text(endless(), PLAIN, context=16, batch_size=2))
    next(batches)
    next(batches)
    assert read <= 5
    assert sum(len(ids) for _, ids, _ in rows_of(Text(endless(), PLAIN, context=16, limit=1000))) == 1000


def test_long_documents_are_tokenised_in_pieces_with_the_tokens_of_the_whole(tmp_path, monkeypatch):
    source = Path(documents.__file__).read_text()
    (tmp_path / "code.py").write_text(source)
    monkeypatch.setattr(documents, "PIECE", 1000)
    pieces = list(documents.Documents(tmp_path))
    assert len(pieces) > 8
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece.text for piece in pieces) == source
    for given_as in (tmp_path, [source]):
        for pack in (True, False):
            rows = rows_of(Text(given_as, PLAIN, context=64, pack=pack))
            assert list(itertools.chain(*(ids for _, ids, _ in rows))) == ids_of(source)
    # A wall of characters without any place to cut is cut all the same.
    assert "".join(p.text for p in documents.Documents(["x" * 5000])) == "x" * 5000


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d.txt", ".hidden", ".git/config"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\0")
    text = Text(tmp_path, PLAIN, pack=False)
    assert [name for _, _, name in rows_of(text)] == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert text.describe()["counts"]["binary"] == 1
    assert [name for _, _, name in rows_of(Text(str(tmp_path / "b.txt"), PLAIN))] == ["b.txt"]
    found = rows_of(Text(str(tmp_path / "**" / "*.txt"), PLAIN, pack=False))
    assert [Path(name).name for _, _, name in found] == ["b.txt", "c.txt", "d.txt"]
    packed = rows_of(Text(tmp_path, PLAIN))
    assert packed[0][2] == "a.md ... sub/deep/d.txt (4 documents)"


def test_encodings(tmp_path):
    words = "Überraschung – naïve café"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / encoding).write_text(words, encoding=encoding)
    for encoding in ("utf-8", "utf-16", "cp1252"):
        assert rows_of(Text(tmp_path / encoding, PLAIN, encoding=encoding))[0][1] == ids_of(words)
    assert rows_of(Text(tmp_path / "utf-8-sig", PLAIN))[0][1] == ids_of(words), "the mark is not text"
    with pytest.raises(TextError, match=r"is not utf-8: byte 0 \(dc\).*encoding='cp1252'"):
        rows_of(Text(tmp_path / "cp1252", PLAIN))
    with pytest.raises(TextError, match="byte order mark of utf-16: pass encoding='utf-16'"):
        rows_of(Text(tmp_path / "utf-16", PLAIN))
    with pytest.raises(TextError, match="no encoding 'utf-9'"):
        Text(tmp_path / "utf-8", PLAIN, encoding="utf-9")
    # Far into a file, behind a mark, and across the chunks that are read.
    (tmp_path / "late").write_bytes(b"\xef\xbb\xbf" + b"x" * (1 << 20) + b"\xff rest")
    with pytest.raises(TextError, match=rf"byte {(1 << 20) + 3} \(ff\)"):
        rows_of(Text(tmp_path / "late", PLAIN))
    (tmp_path / "cut").write_bytes("fin é".encode()[:-1])
    with pytest.raises(TextError, match=r"byte 4 \(c3\)"):
        rows_of(Text(tmp_path / "cut", PLAIN))


def test_bad_sources_say_what_to_do(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "model.bin").write_bytes(b"\0\1\2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match=r"no file or folder .*note\.txt'; nearest: notes\.txt"):
        Text(str(tmp_path / "note.txt"), PLAIN)
    (tmp_path / ("deep" * 10)).mkdir()
    with pytest.raises(TextError, match=r"no file or folder .*no-such-file\.txt'"):  # however long the path before it
        Text(str(tmp_path / ("deep" * 10) / "no-such-file.txt"), PLAIN)
    with pytest.raises(TextError, match=r"to give the text itself, pass \[text\]"):
        Text("The cat sat on\nthe mat", PLAIN)
    with pytest.raises(TextError, match="taken for a path"):
        Text("word " * 2000, PLAIN)
    with pytest.raises(TextError, match=r"no file matches .*\*\.rst"):
        Text(str(tmp_path / "*.rst"), PLAIN)
    with pytest.raises(TextError, match="holds no files"):
        Text(tmp_path / "empty", PLAIN)
    for name in ("blank.txt", "nothing.txt"):
        with pytest.raises(TextError, match=rf"no text in file .*{name}: it is empty or only whitespace"):
            rows_of(Text(tmp_path / name, PLAIN))
    with pytest.raises(TextError, match="binary file"):
        rows_of(Text(tmp_path / "model.bin", PLAIN))
    with pytest.raises(TextError, match="there is no text in 0 texts"):
        rows_of(Text([], PLAIN))
    with pytest.raises(TextError, match="needs a tokenizer"):
        Text(["x"], None)
    with pytest.raises(TextError, match="text 1 is an int"):
        rows_of(Text(["x", 3], PLAIN))
    with pytest.raises(TextError, match="not None"):
        Text(None, PLAIN)
    once = Text((part for part in SAMPLE), PLAIN)
    rows_of(once)
    with pytest.raises(TextError, match="only once"):
        rows_of(once)
    for wrong in ({"context": 0}, {"batch_size": 0}, {"overlong": "cut"}, {"limit": 0}):
        with pytest.raises(TextError, match=next(iter(wrong))):
            Text(["x"], PLAIN, **wrong)
    with pytest.raises(TextError, match="no room beside 2 special tokens"):
        Text(["x"], BERT, context=2)
    with pytest.raises(TextError, match="no shard 2 of 2"):
        Text(["x"], PLAIN).shard(2, 2)


def test_rows_mappings_and_tables():
    import pandas as pd

    rows = [{"body": "one fox", "id": 1}, {"body": "two dogs", "id": 2}]
    expected = [ids_of("one fox"), ids_of("two dogs")]
    for source in (rows, pd.DataFrame(rows)):
        assert [ids for _, ids, _ in rows_of(Text(source, PLAIN, column="body", pack=False))] == expected
    named = rows_of(Text({"first": "one fox", "second": "two dogs"}, PLAIN, pack=False))
    assert [(ids, name) for _, ids, name in named] == list(zip(expected, ("first", "second"), strict=True))
    with pytest.raises(TextError, match="columns are body, id"):
        Text(pd.DataFrame(rows), PLAIN)
    with pytest.raises(TextError, match="row 0 has no column 'bod'; nearest: body"):
        rows_of(Text(rows, PLAIN, column="bod"))


def test_datasets():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["one fox", "two dogs"], "label": [0, 1]})
    for source in (data, data.to_iterable_dataset()):
        text = Text(source, PLAIN, pack=False)
        assert [ids for _, ids, _ in rows_of(text)] == [ids_of("one fox"), ids_of("two dogs")]
        assert "column 'text'" in text.describe()["source"]
    with pytest.raises(TextError, match="columns are text, label"):
        Text(data, PLAIN, column="txt")
    with pytest.raises(TextError, match="several splits; choose one: train, test"):
        Text(datasets.DatasetDict({"train": data, "test": data}), PLAIN)


def test_describe():
    text = Text(["one fox", "", " \n", "two dogs"], PLAIN, context=4)
    assert text.describe()["counts"] is None
    rows = rows_of(text)
    about = text.describe()
    assert about["counts"] == {
        "documents": 2, "sequences": len(rows), "tokens": sum(len(ids) for _, ids, _ in rows), "empty": 2, "binary": 0,
        "split": 0, "truncated": 0, "dropped": 0, "complete": True,
    }  # fmt: skip
    assert about["special"] == {"before": [], "between": ["<e>"], "after": []}
    text = Text(["one fox", "two dogs"], PLAIN, context=4, batch_size=1)
    next(iter(text))
    assert not text.describe()["counts"]["complete"]
    assert Text(["x"], PLAIN).context == 1024, "a tokenizer that names no length gets a moderate one"


def test_encode():
    batch = encode("one fox", LLAMA)
    assert batch.ids.tolist() == [[BOS, *ids_of("one fox")]]
    assert batch.mask is None
    batch = encode(["The quick", "fox"], PLAIN)
    long, short = ids_of("The quick"), ids_of("fox")
    assert batch.ids[0].tolist() == long
    assert batch.ids[1].tolist() == short + [EOS] * (len(long) - len(short))
    assert batch.mask.sum(dim=1).tolist() == [len(long), len(short)]
    assert (batch.source, batch.sequence) == (("#0", "#1"), (0, 1))
    ids = torch.tensor([[1, 2], [3, 4]])
    assert encode(ids).ids is ids
    assert encode(ids[0].int()).ids.tolist() == [[1, 2]]
    assert encode([1, 2]).ids.tolist() == [[1, 2]]
    assert encode(ids.numpy()).ids.tolist() == ids.tolist()
    assert encode([[1, 2], torch.tensor([3])]).mask.tolist() == [[True, True], [True, False]]
    for wrong, words in (
        ("", "the text is empty"),
        (["a", ""], "row 1 of 2 is empty"),
        ([], "list is empty"),
        ([[1], []], "row 1 of 2 is empty"),
        (torch.zeros(2, 3), "integers, and this tensor is float32"),
        (torch.ones(2, dtype=torch.bool), "this tensor is bool"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"not \(1, 2, 3\)"),
        (torch.zeros(0, dtype=torch.long), "none of them empty"),
        (["a", 1], "not this list"),
        ([0.5, 1.0], "float32"),
        (object(), "not this object"),
    ):
        with pytest.raises(TextError, match=words):
            encode(wrong, PLAIN)
    with pytest.raises(TextError, match="no tokenizer"):
        encode("hello")
