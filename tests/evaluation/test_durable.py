"""Journals and whole files: every byte at which a write can end."""

import errno
import os
import stat

import pytest

from gse_jax.evaluation.durable import Journal, StoreError, read_journal, write_file

ENTRIES = [{"name": "a", "value": 0.1}, {"name": "Zoë", "value": None},
           {"name": "c\n\"", "value": [1, "x", 1e-300]}]


def written(path, entries):
    with Journal(path) as journal:
        journal.append(entries)


def test_entries_come_back_as_they_were(tmp_path):
    path = tmp_path / "j.jsonl"
    written(path, ENTRIES[:1])
    written(path, ENTRIES[1:])
    assert list(read_journal(path)) == ENTRIES
    assert list(read_journal(tmp_path / "absent.jsonl")) == []


def test_cut_at_any_byte_the_rest_is_whole_and_writing_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    written(path, ENTRIES)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 3
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        # A line that lacks only its line break is whole.
        whole = sum(end - 1 <= cut for end in ends)
        assert list(read_journal(path)) == ENTRIES[:whole], cut
        written(path, [{"next": cut}])
        assert list(read_journal(path)) == [*ENTRIES[:whole], {"next": cut}], cut


def test_no_changed_byte_goes_unnoticed(tmp_path):
    path = tmp_path / "j.jsonl"
    written(path, ENTRIES)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        for entry in read_journal(path):
            assert entry in ENTRIES, place


@pytest.mark.parametrize("error, seen, words", [
    (OSError(errno.ENOSPC, "No space left on device"), StoreError, "j.jsonl: the disk is full; free some space"),
    (KeyboardInterrupt(), KeyboardInterrupt, None)])
def test_a_write_that_fails_half_way_tears_no_neighbour(tmp_path, monkeypatch, error, seen, words):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append(ENTRIES[:1])
        real = os.write

        def full(file, content):
            if len(content) < 20:
                raise error
            return real(file, content[:10])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(seen, match=words):
            journal.append(ENTRIES[1:2])
        monkeypatch.undo()
        for entry in ENTRIES[2:] + ENTRIES[:1]:
            journal.append([entry])
    assert list(read_journal(path)) == [ENTRIES[0], ENTRIES[2], ENTRIES[0]]
    assert path.read_bytes().count(b"\n") == 4  # the torn one is ended once


@pytest.fixture
def flushed(monkeypatch):
    """What is flushed, by size or as "folder", and which names are given, in order."""
    calls, fsync = [], os.fsync

    def noted(file):
        status = os.fstat(file)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    for name in ("replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *paths, name=name, real=real: calls.append(name) or real(*paths))
    return calls


@pytest.mark.skipif(os.name == "nt", reason="Windows orders the names itself")
def test_a_power_cut_finds_the_content_before_the_name(tmp_path, flushed):
    write_file(tmp_path / "f", lambda file: file.write(b"new"))
    assert flushed == [3, "replace", "folder"]
    flushed.clear()
    write_file(tmp_path / "g", lambda file: file.write(b"first"), exclusive=True)
    assert flushed == [5, "link", "folder"]
    flushed.clear()
    with Journal(tmp_path / "j.jsonl") as journal:
        assert flushed == ["folder"]
        for entry in ENTRIES:
            journal.append([entry])
            assert flushed[1:] == [(tmp_path / "j.jsonl").stat().st_size]
            del flushed[1:]


def test_nan_is_refused_rather_than_written(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal, pytest.raises(ValueError, match="JSON"):
        journal.append([{"value": float("nan")}])
    assert (tmp_path / "j.jsonl").read_bytes() == b""


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "f"
    assert write_file(path, lambda file: file.write(b"old"))

    def breaks(file):
        file.write(b"half")
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.raises(StoreError, match="quota is used up"):
        write_file(path, breaks)
    assert path.read_bytes() == b"old"
    assert not write_file(path, lambda file: file.write(b"new"), exclusive=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_is_written_once_also_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # exFAT

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "f"
    assert write_file(path, lambda file: file.write(b"old"), exclusive=True)
    assert not write_file(path, lambda file: file.write(b"new"), exclusive=True)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("line", [b'{"a":NaN,"checksum":"0"}', b'{"a":1e999,"checksum":"0"}', b"[" * 100_000,
                                  b"[1]", b"7", b"null", b'{"a":' + b"[" * 800 + b"]" * 800 + b',"checksum":"0"}'])
def test_a_damaged_line_that_is_json_is_dropped_too(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    written(path, ENTRIES[:2])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + b"\n" + second)
    assert list(read_journal(path)) == ENTRIES[:2]
