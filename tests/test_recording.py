"""Recordings: what goes in comes out, in memory and on disk, whatever the batches, the shards and the interruptions."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actome.core.errors import RecordingError, SiteError
from actome.core.recording import Recording
from actome.core.store import Writer

SITES = {
    "blocks.0.resid.post": ("batch", "pos", "d_model"),
    "blocks.1.resid.post": ("batch", "pos", "d_model"),
    "blocks.0.attn.q": ("batch", "head", "query", "d_head"),
    "blocks.0.attn.pattern": ("batch", "head", "query", "key"),
    "pooled": ("batch", "class"),
}
RESID, Q, PATTERN, POOLED = "blocks.0.resid.post", "blocks.0.attn.q", "blocks.0.attn.pattern", "pooled"


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    """Leaves out the waiting for the disk, which only a power cut would show."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def truth(number: int, length: int) -> dict[str, torch.Tensor]:
    """What each site carries in one sequence, laid out as it is stored."""
    noise = torch.Generator().manual_seed(1000 * number + length)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    return {
        "tokens": torch.randint(100, (length,), generator=noise),
        "blocks.0.resid.post": some(length, 4),
        "blocks.1.resid.post": some(length, 4),
        Q: some(length, 2, 3).bfloat16(),
        PATTERN: some(2, length, length),
        POOLED: some(5).double(),
    }


def batch_of(lengths: list[int], first: int = 0) -> dict:
    """The arguments of `Writer.add` for some sequences; padding is NaN, so that nobody can use it unnoticed."""
    rows, width = len(lengths), max(lengths)
    tensors = {
        "blocks.0.resid.post": torch.full((rows, width, 4), torch.nan),
        "blocks.1.resid.post": torch.full((rows, width, 4), torch.nan),
        Q: torch.full((rows, 2, width, 3), torch.nan, dtype=torch.bfloat16),
        PATTERN: torch.full((rows, 2, width, width), torch.nan),
        POOLED: torch.empty(rows, 5, dtype=torch.float64),
    }
    tokens = torch.full((rows, width), -1)
    for row, n in enumerate(lengths):
        real = truth(first + row, n)
        tokens[row, :n] = real["tokens"]
        for name in ("blocks.0.resid.post", "blocks.1.resid.post"):
            tensors[name][row, :n] = real[name]
        tensors[Q][row, :, :n] = real[Q].transpose(0, 1)
        tensors[PATTERN][row, :, :n, :n] = real[PATTERN]
        tensors[POOLED][row] = real[POOLED]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {
        "tensors": tensors,
        "tokens": tokens,
        "mask": None if mask.all() else mask,
        "source": tuple(f"doc {first + row}" for row in range(rows)),
        "sequence": tuple(range(first, first + rows)),
    }


def recording_of(lengths: list[int]) -> Recording:
    batch = batch_of(lengths)
    return Recording(batch["tensors"], SITES, batch["tokens"], batch["mask"], batch["source"], batch["sequence"])


def split(lengths: list[int], sizes: list[int]) -> list[dict]:
    """The sequences in batches of these sizes, over and over."""
    batches, first = [], 0
    while first < len(lengths):
        size = sizes[len(batches) % len(sizes)]
        batches.append(batch_of(lengths[first : first + size], first))
        first += size
    return batches


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)  # false where there is a NaN


def check(recording: Recording, lengths: list[int]) -> None:
    """The recording holds exactly the sequences of these lengths, by every way of reading it."""
    real = [truth(number, n) for number, n in enumerate(lengths)]
    assert recording.n_sequences == len(lengths)
    assert recording.n_tokens == sum(lengths)
    assert recording.source == tuple(f"doc {i}" for i in range(len(lengths)))
    assert recording.numbers == tuple(range(len(lengths)))
    for name in ("blocks.0.resid.post", "blocks.1.resid.post", Q):
        flat = torch.cat([one[name] for one in real])
        assert same(recording.flat(name), flat)
        for start, stop in ((0, 1), (1, 5), (3, len(flat)), (len(flat), len(flat) + 3)):
            assert same(recording.rows(name, start, stop), flat[start:stop])
    assert same(recording[POOLED], torch.stack([one[POOLED] for one in real]))
    for row, one in enumerate(real):
        for name in SITES:
            assert same(recording.sequence(row, name), one[name])
    assert same(recording.sequence(-1, PATTERN), real[-1][PATTERN])
    width = max(lengths)
    assert recording.tokens.shape == (len(lengths), width)
    mask = torch.ones_like(recording.tokens, dtype=torch.bool) if recording.mask is None else recording.mask
    assert mask.sum(dim=1).tolist() == lengths
    assert same(recording.tokens[mask], torch.cat([one["tokens"] for one in real]))
    assert recording[Q].shape == (len(lengths), 2, width, 3)
    assert recording[PATTERN].shape == (len(lengths), 2, width, width)
    assert same(recording[Q].transpose(1, 2)[mask], torch.cat([one[Q] for one in real]))


def write(path: Path, batches: list[dict], **options) -> Writer:
    with Writer(path, SITES, **options) as writer:
        for batch in batches:
            writer.add(**batch)
    return writer


lengths_of = st.lists(st.integers(1, 7), min_size=1, max_size=9)
sizes_of = st.lists(st.integers(1, 4), min_size=1, max_size=3)


# -- in memory --------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(lengths_of)
def test_in_memory(lengths):
    check(recording_of(lengths), lengths)


@settings(max_examples=25, deadline=None)
@given(lengths_of, st.integers(1, 4))
def test_batches_are_the_recording_in_pieces(lengths, size):
    recording = recording_of(lengths)
    parts = list(recording.batches(size))
    assert [part.n_sequences for part in parts[:-1]] == [size] * (len(parts) - 1)
    for name in (RESID, Q):
        assert same(torch.cat([part.flat(name) for part in parts]), recording.flat(name))
    assert sum((part.numbers for part in parts), ()) == recording.numbers
    assert list(next(recording.batches(size, "*.*.attn.q"))) == [Q]


def test_stacked_layers_are_views_where_there_is_a_stack():
    stack = torch.randn(4, 2, 3, 5)
    names = tuple(f"blocks.{i}.resid.post" for i in range(4))
    dims = dict.fromkeys(names, ("batch", "pos", "d_model"))
    recording = Recording({}, dims, stacks={"blocks.*.resid.post": (stack, names)})
    assert recording["blocks.*.resid.post"] is stack
    assert recording["blocks.{1..2}.resid.post"].data_ptr() == stack[1].data_ptr()
    assert same(recording["blocks.{1..2}.resid.post"], stack[1:3])
    assert same(recording["blocks.{0,3}.resid.post"], stack[[0, 3]])
    assert recording["blocks.2.resid.post"].data_ptr() == stack[2].data_ptr()
    assert recording.flat("blocks.*.resid.post").shape == (4, 6, 5)
    half = recording.to(torch.float16)
    assert half["blocks.*.resid.post"].dtype == torch.float16
    assert half["blocks.*.resid.post"].data_ptr() == half["blocks.0.resid.post"].data_ptr()
    assert dict(recording).keys() == dims.keys()


def test_patterns_without_a_stack_are_stacked():
    recording = recording_of([3, 5])
    stacked = recording["blocks.*.resid.post"]
    assert stacked.shape == (2, 2, 5, 4)
    assert torch.equal(stacked.nan_to_num(), torch.stack([recording[n] for n in list(SITES)[:2]]).nan_to_num())
    assert recording.sites("blocks.0.attn.{q,pattern}") == (Q, PATTERN)
    with pytest.raises(RecordingError, match="one by one"):
        recording["blocks.0.attn.{q,pattern}"]


def test_it_is_a_mapping():
    recording = recording_of([3, 5])
    assert len(recording) == 5
    assert list(recording) == list(SITES)
    assert RESID in recording
    assert "blocks.*.resid.post" not in recording
    assert recording.get("nothing") is None
    assert recording == recording
    assert recording != recording_of([3, 5])
    with pytest.raises(SiteError, match=r"no site 'blocks\.0\.resid\.pots'; nearest: blocks\.0\.resid\.post"):
        recording["blocks.0.resid.pots"]
    with pytest.raises(SiteError, match=r"nearest: blocks\.\*\.resid\.post"):
        recording["blocks.*.resid.pots"]
    with pytest.raises(SiteError, match="one site, not the pattern"):
        recording.sequence(0, "blocks.*.resid.post")
    with pytest.raises(RecordingError, match=r"each pair of positions .*use sequence\(i"):
        recording.flat(PATTERN)


def test_to_moves_numbers_and_keeps_integers():
    dims = {"moe.router": ("batch", "pos", "choice"), "embed": ("batch", "pos", "d_model")}
    recording = Recording({"moe.router": torch.ones(1, 2, 2).long(), "embed": torch.ones(1, 2, 3)}, dims)
    moved = recording.to("cpu", torch.bfloat16)
    assert moved["moe.router"].dtype == torch.int64
    assert moved["embed"].dtype == torch.bfloat16
    assert recording["embed"].dtype == torch.float32


def test_images_are_flat_by_place():
    x = torch.randn(2, 3, 4, 5)
    recording = Recording({"conv": x}, {"conv": ("batch", "channel", "height", "width")})
    assert same(recording.flat("conv"), x.permute(0, 2, 3, 1).reshape(-1, 3))
    assert (recording.n_sequences, recording.n_tokens) == (2, 0)


def test_a_mask_that_does_not_fit_is_an_error():
    mask = torch.tensor([[True, True, False]])
    recording = Recording(
        {"decoder.embed": torch.ones(1, 5, 2)}, {"decoder.embed": ("batch", "pos", "d_model")}, None, mask
    )
    for read in (lambda: recording.flat("decoder.embed"), lambda: recording.sequence(0, "decoder.embed")):
        with pytest.raises(RecordingError, match="has 5 positions where the tokens have 3"):
            read()


def test_it_prints_well(tmp_path):
    recording = recording_of([3, 5])
    assert repr(recording).splitlines() == [
        "Recording of 2 sequences, 8 tokens, 920 B",
        "  blocks.{0..1}.resid.post  batch 2, pos 5, d_model 4           float32   320 B",
        "  blocks.0.attn.q           batch 2, head 2, query 5, d_head 3  bfloat16  120 B",
        "  blocks.0.attn.pattern     batch 2, head 2, query 5, key 5     float32   400 B",
        "  pooled                    batch 2, class 5                    float64   80 B",
    ]
    recording.save(tmp_path / "rec")
    lines = repr(Recording.open(tmp_path / "rec")).splitlines()
    assert lines[0] == f"Recording in {tmp_path / 'rec'} of 2 sequences, 8 tokens, 704 B"
    assert lines[1].split("  ")[1:3] == ["blocks.{0..1}.resid.post", "batch 2, pos 5, d_model 4"]


# -- on disk ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(lengths_of, sizes_of, st.integers(1, 3000))
def test_any_batches_and_any_shards_hold_the_same(tmp_path_factory, lengths, sizes, shard_bytes):
    path = tmp_path_factory.mktemp("any") / "rec"
    writer = write(path, split(lengths, sizes), shard_bytes=shard_bytes)
    assert writer.done == len(lengths)
    recording = Recording.open(path)
    assert recording.complete
    assert recording.dims == SITES
    check(recording, lengths)
    # The shards follow from the sequences alone, and padding is in none of them.
    again = path.with_name("again")
    write(again, [batch_of(lengths)], shard_bytes=shard_bytes)
    assert [p.name for p in shards(path)] == [p.name for p in shards(again)]
    for one, other in zip(shards(path), shards(again), strict=True):
        assert one.read_bytes() == other.read_bytes()
        for tensor in safetensors.torch.load_file(one).values():
            assert not tensor.isnan().any()
    shutil.rmtree(path.parent)


@settings(max_examples=20, deadline=None)
@given(lengths_of, sizes_of, st.integers(1, 2000), st.integers(0, 9), st.data())
def test_resumed_after_any_cut_equals_uninterrupted(tmp_path_factory, lengths, sizes, shard_bytes, cut, data):
    path = tmp_path_factory.mktemp("cut") / "rec"
    batches = split(lengths, sizes)
    with pytest.raises(KeyboardInterrupt), Writer(path, SITES, shard_bytes=shard_bytes) as writer:  # noqa: PT012
        for number, batch in enumerate(batches):
            if number == cut:
                raise KeyboardInterrupt
            writer.add(**batch)
        raise KeyboardInterrupt
    assert writer.done == sum(len(batch["sequence"]) for batch in batches[:cut])
    if writer.done:
        check(Recording.open(path), lengths[: writer.done])
    assert not Recording.open(path).complete
    with Writer(path, SITES, resume=True, shard_bytes=shard_bytes) as writer:
        size = data.draw(st.integers(1, 4))
        while (first := writer.done) < len(lengths):
            writer.add(**batch_of(lengths[first : first + size], first))
            writer.flush()
    assert writer.done == len(lengths)
    check(Recording.open(path), lengths)
    assert Recording.open(path).complete
    shutil.rmtree(path.parent)


def test_saved_opened_and_saved_again(tmp_path):
    lengths = [3, 1, 6, 6]
    recording_of(lengths).save(tmp_path / "one")
    check(Recording.open(tmp_path / "one"), lengths)
    check(Recording.open(tmp_path / "one").to(), lengths)
    Recording.open(tmp_path / "one").save(tmp_path / "two", shard_bytes=500)
    check(Recording.open(tmp_path / "two"), lengths)
    assert len(shards(tmp_path / "two")) > 1
    for part, rows in zip(Recording.open(tmp_path / "two").batches(3), ([3, 1, 6], [6]), strict=True):
        assert part.n_sequences == len(rows)
        assert part[RESID].shape[1] == max(rows)


def test_readable_without_actome(tmp_path, monkeypatch, capsys):
    """The code of the page on the format, run as it stands there."""
    lengths = [3, 1, 6, 2, 5]
    path = tmp_path / "folder"
    write(path, split(lengths, [2]), shard_bytes=600)
    assert len(shards(path)) > 1
    page = (Path(__file__).parent.parent / "docs" / "recording-format.md").read_text()
    code = re.search(r"## Reading it without actome\s+```python\n(.*?)```", page, re.DOTALL)[1]
    for name in [name for name in sys.modules if name.split(".")[0] == "actome"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(code, space)
    index = space["index"].to_pylist()
    assert [row["sequence"] for row in index] == list(range(len(lengths)))
    assert [row["length"] for row in index] == lengths
    for row in index:
        for site in SITES:
            assert same(space["read"](site, row), truth(row["sequence"], row["length"])[site])
    assert "doc 4 blocks.0.attn.q (5, 2, 3)" in capsys.readouterr().out
    about = json.loads((path / "recording.json").read_text())
    assert about["sites"][Q] == {
        "dims": ["batch", "head", "query", "d_head"], "layout": "tokens", "stored": ["token", "head", "d_head"],
        "dtype": "bfloat16", "features": [2, 3],
    }  # fmt: skip


def test_append(tmp_path):
    path = tmp_path / "rec"
    write(path, [batch_of([3, 2])], meta={"text": "first"})
    write(path, [batch_of([4])], append=True, meta={"text": "second"})
    recording = Recording.open(path)
    assert recording.numbers == (0, 1, 0)
    assert same(recording.sequence(2, PATTERN), truth(0, 4)[PATTERN])
    assert recording.meta == {"text": "first", "appended": [{"text": "second"}]}
    # Resuming goes on with the text that was appended last.
    with Writer(path, SITES, resume=True, meta={"text": "second"}) as writer:
        assert writer.done == 1
        writer.add(**batch_of([2], 1))
    assert Recording.open(path).numbers == (0, 1, 0, 1)


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "rec"
    write(path, [batch_of([3, 2])], meta={"model": "tiny", "text": {"source": "a", "counts": None}})
    with pytest.raises(RecordingError, match=r"resume=True .* append=True .* overwrite=True"):
        Writer(path, SITES)
    with pytest.raises(RecordingError, match="choose one"):
        Writer(path, SITES, append=True, resume=True)
    with pytest.raises(RecordingError, match=r"pooled is \(batch, class\) there and absent now"):
        Writer(path, {k: v for k, v in SITES.items() if k != POOLED}, append=True)
    with pytest.raises(RecordingError, match=r"pooled is \(batch, class\) there and \(batch, d_model\) now"):
        Writer(path, {**SITES, POOLED: ("batch", "d_model")}, append=True)
    with pytest.raises(RecordingError, match=r"another text \(source: 'a' then, 'b' now\)"):
        Writer(path, SITES, resume=True, meta={"text": {"source": "b", "counts": {}}})
    with pytest.raises(RecordingError, match="another model"):
        Writer(path, SITES, resume=True, meta={"model": "other"})
    with Writer(path, SITES, resume=True, meta={"text": {"source": "a", "counts": 7}}) as writer:
        with pytest.raises(RecordingError, match=r"sequence 0 comes after sequence 1, .*text\.skip\(2\)"):
            writer.add(**batch_of([1]))
        good = batch_of([3, 2], 2)
        for change, words in (
            ({POOLED: torch.zeros(2, 5)}, r"pooled has float64 and feature sizes \[5\] in .* and float32 and feat"),
            ({POOLED: torch.zeros(2, 6).double()}, r"\[5\] in .* \[6\] now"),
            ({POOLED: torch.zeros(3, 5).double()}, "pooled has 3 rows, and the numbers of 2 sequences"),
            ({POOLED: torch.zeros(2).double()}, r"pooled has the shape \(2,\)"),
            ({RESID: torch.zeros(2, 9, 4)}, "has 9 positions where the tokens have 3"),
            ({"extra": torch.zeros(2)}, "no more and no fewer; see extra"),
        ):
            with pytest.raises(RecordingError, match=words):
                writer.add(**{**good, "tensors": {**good["tensors"], **change}})
        with pytest.raises(RecordingError, match="source has 1 rows"):
            writer.add(**{**good, "source": ("x",)})
        with pytest.raises(RecordingError, match="begun with token ids"):
            writer.add(**{**good, "tokens": None})
        writer.add(**good)  # a batch that was refused has left nothing behind
    with pytest.raises(RecordingError, match="is closed"):
        writer.add(**batch_of([1], 9))
    assert Recording.open(path).n_sequences == 4
    with pytest.raises(RecordingError, match="one batch dim"):
        Writer(tmp_path / "other", {"x": ("pos", "d_model")})
    with pytest.raises(RecordingError, match="under the name 'tokens'"):
        Writer(tmp_path / "other", {"tokens": ("batch", "pos")})
    assert not (tmp_path / "other").exists()


def test_overwriting_deletes_recordings_and_nothing_else(tmp_path):
    path = tmp_path / "rec"
    write(path, [batch_of([3, 2])])
    (path / "notes.txt").write_text("mine")
    write(path, [batch_of([4])], overwrite=True)
    check(Recording.open(path), [4])
    assert (path / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    for option in ({}, {"overwrite": True}, {"append": True}, {"resume": True}):
        with pytest.raises(RecordingError, match="not empty and not a recording"):
            Writer(other, SITES, **option)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    with pytest.raises(RecordingError, match="is a file"):
        Writer(other / "thesis.txt", SITES)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", [batch_of([4])])


def test_damage_is_told_by_name(tmp_path):
    path = tmp_path / "rec"

    def fresh():
        write(path, split([3, 2, 5], [1]), shard_bytes=1, overwrite=True)
        return shards(path)

    whole = fresh()[1].read_bytes()
    for damage in (whole[:-1], whole[:20], b"", b"\xff" * len(whole)):
        fresh()[1].write_bytes(damage)
        with pytest.raises(RecordingError, match=r"00001\.safetensors is truncated or damaged"):
            Recording.open(path)
    fresh()[1].unlink()
    with pytest.raises(RecordingError, match=r"00001\.safetensors is missing"):
        Recording.open(path)
    fresh()[1].write_bytes(fresh()[2].read_bytes())
    with pytest.raises(RecordingError, match=r"00001\.safetensors is damaged: tokens has the shape \[5\], .* \[2\]"):
        Recording.open(path)
    fresh()
    (path / "index.parquet" / "00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(RecordingError, match=r"00002\.parquet is damaged"):
        Recording.open(path)
    header = (fresh()[0].parent.parent / "recording.json").read_text()
    for text, words in (
        (header[:50], "is damaged"),
        ("{}", "is damaged"),
        ("[]", "is damaged"),
        (header.replace('"version": 1', '"version": 2'), "format version 2, and this actome reads up to 1"),
        (header.replace("actome-recording", "zarr"), "is not a recording"),
    ):
        (path / "recording.json").write_text(text)
        with pytest.raises(RecordingError, match=words):
            Recording.open(path)
    with pytest.raises(RecordingError, match=r"no recording .*rce; nearest: rec"):
        Recording.open(tmp_path / "rce")
    with pytest.raises(RecordingError, match=r"it has no recording\.json"):
        Recording.open(tmp_path)


@pytest.mark.parametrize("file", ["shard", "index", "rename"])
def test_a_full_disk(tmp_path, monkeypatch, file):
    path = tmp_path / "rec"
    lengths = [3, 2, 5, 1]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = 0

    def fails_late(write, error):
        def wrapped(data, target, **options):
            nonlocal calls
            calls += 1
            if calls == 3:
                Path(target).write_bytes(b"half of it")
                raise error
            return write(data, target, **options)

        return wrapped

    if file == "shard":  # safetensors reports it in its own way
        error = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        monkeypatch.setattr(safetensors.torch, "save_file", fails_late(safetensors.torch.save_file, error))
    elif file == "index":
        monkeypatch.setattr(pq, "write_table", fails_late(pq.write_table, full))
    with pytest.raises(RecordingError) as caught, Writer(path, SITES, shard_bytes=1) as writer:  # noqa: PT012
        for number, batch in enumerate(split(lengths, [1])):
            if file == "rename" and number == 2:
                monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(full))
            writer.add(**batch)
    monkeypatch.undo()
    assert re.search(
        r"the disk is full\. 2 sequences .*stay readable.*resume=True .*text\.skip\(2\)", str(caught.value)
    )
    assert not [p for p in path.rglob("*") if p.name.startswith(".")], "temporary files are gone"
    assert len(shards(path)) == 2
    check(Recording.open(path), lengths[:2])
    with Writer(path, SITES, resume=True) as writer:
        for batch in split(lengths, [1])[writer.done :]:
            writer.add(**batch)
    check(Recording.open(path), lengths)


def test_files_are_flushed_then_renamed_and_the_shard_comes_first(tmp_path, monkeypatch):
    events, rename = [], os.replace

    def flushed(descriptor):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    def renamed(source, target):
        events.append(("rename", Path(target).name))
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    writer = Writer(tmp_path / "rec", SITES)
    writer.add(**batch_of([3]))
    events.clear()
    writer.flush()
    assert events == [
        ("flush", ".00000.safetensors.tmp"), ("rename", "00000.safetensors"), ("flush", "shards"),
        ("flush", ".00000.parquet.tmp"), ("rename", "00000.parquet"), ("flush", "index.parquet"),
    ]  # fmt: skip


def test_no_tokens_and_pairs_alone(tmp_path):
    dims = {"attn.pattern": ("batch", "head", "query", "key")}
    x = torch.rand(2, 3, 4, 4)
    with Writer(tmp_path / "pairs", dims) as writer:
        writer.add({"attn.pattern": x}, None, None, (), (0, 1), prompt_length=(2, 3))
    recording = Recording.open(tmp_path / "pairs")
    assert same(recording["attn.pattern"], x)
    assert recording.tokens is None
    assert recording.mask is None
    assert recording.n_tokens == 8
    assert recording.prompt_length == (2, 3)
    assert next(recording.batches(1)).prompt_length == (2,)
    images = {"conv": ("batch", "channel", "height", "width")}
    with Writer(tmp_path / "images", images) as writer:
        writer.add({"conv": x}, None, None, ("a", "b"), (0, 1))
    recording = Recording.open(tmp_path / "images")
    assert same(recording["conv"], x)
    assert recording.flat("conv").shape == (32, 3)
    # Keys of a cache are more than the queries at hand; nothing says which of them are padding.
    with Writer(tmp_path / "cache", dims) as writer:
        mask = torch.tensor([[True], [True]])
        writer.add({"attn.pattern": x[:, :, :1]}, None, mask, (), (0, 1))
    assert same(Recording.open(tmp_path / "cache").sequence(1, "attn.pattern"), x[1, :, :1])


def test_nothing_recorded_yet(tmp_path):
    Writer(tmp_path / "rec", SITES)
    recording = Recording.open(tmp_path / "rec")
    assert (recording.n_sequences, recording.n_tokens, recording.complete) == (0, 0, False)
    assert "0 sequences" in repr(recording)
    with pytest.raises(RecordingError, match="nothing was recorded"):
        recording[RESID]
    write(tmp_path / "rec", [batch_of([2])], resume=True)
    check(Recording.open(tmp_path / "rec"), [2])


def test_what_is_read_is_a_copy(tmp_path):
    recording_of([3, 5]).save(tmp_path / "rec")
    recording = Recording.open(tmp_path / "rec")
    recording.rows(RESID, 0, 3).zero_()
    recording.sequence(0, PATTERN).zero_()
    recording[POOLED].zero_()
    check(recording, [3, 5])


def test_what_was_added_may_change_afterwards(tmp_path):
    batch = batch_of([3, 3])
    with Writer(tmp_path / "rec", SITES) as writer:
        writer.add(**batch)
        for tensor in batch["tensors"].values():
            tensor.zero_()
    check(Recording.open(tmp_path / "rec"), [3, 3])


# -- killed -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_recording import SITES, Writer, split
import pyarrow.parquet, safetensors.torch  # before the forks

LENGTHS, STEPS = [3, 2], {steps}
rename = os.replace
os.fsync = lambda _: None

def run(path, fatal, stop):
    renames = 0
    def replace(*names):
        nonlocal renames
        renames += 1
        if renames - 1 == fatal // 2 and fatal % 2 == 0: stop()
        rename(*names)
        if renames - 1 == fatal // 2: stop()
    os.replace = replace
    with Writer(path, SITES, shard_bytes=1) as writer:
        for batch in split(LENGTHS, [1]):
            writer.add(**batch)

if STEPS:  # before and after every rename, in a child of its own
    for fatal in range(STEPS):
        if not os.fork():
            run(f"{{sys.argv[2]}}/{{fatal}}", fatal, lambda: os.kill(os.getpid(), signal.SIGKILL))
            os._exit(0)
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL, fatal
else:  # the shard is in place and its index is not: says so and waits to be killed
    run(f"{{sys.argv[2]}}/waits", 10, lambda: (print("now", flush=True), sys.stdin.read()))
"""


def killed(steps: int, folder: Path) -> subprocess.Popen:
    code = KILLED.format(steps=steps)
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=os.getcwd()
    )


def resume(path: Path) -> None:
    lengths = [3, 2]
    with Writer(path, SITES, resume=True) as writer:
        if writer.done < len(lengths):
            writer.add(**batch_of(lengths[writer.done :], writer.done))
    check(Recording.open(path), lengths)
    assert not [p for p in path.rglob("*") if p.name.startswith(".")]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_in_the_middle(tmp_path):
    process = killed(0, tmp_path)
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()
    path = tmp_path / "waits"
    assert len(shards(path)) == 2
    check(Recording.open(path), [3])
    resume(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_and_after_every_rename(tmp_path):
    # The description, the description with dtypes, then a shard and an index for each of two sequences.
    steps = 2 * (2 + 2 * 2)
    process = killed(steps, tmp_path)
    process.communicate()
    assert process.returncode == 0
    for fatal in range(steps):
        path = tmp_path / str(fatal)
        if fatal:  # else it was killed before there was a description
            recording = Recording.open(path)
            assert recording.n_sequences == sum(fatal > 2 * index for index in (3, 5)), fatal
            if recording.n_sequences:
                check(recording, [3, 2][: recording.n_sequences])
        resume(path)


def test_importing_it_is_light():
    heavy = ["pyarrow", "pandas", "safetensors", "transformers"]
    code = f"import sys, actome.core.recording, actome.core.text; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def shards(path: Path) -> list[Path]:
    return sorted((path / "shards").glob("*.safetensors"))
