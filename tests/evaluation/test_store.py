"""The run directory: what a kill between any two system calls leaves behind."""

import contextlib
import os
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

from gse_jax.evaluation.durable import StoreError
from gse_jax.evaluation.lock import WriterLock
from gse_jax.evaluation.store import (
    Finished,
    Writer,
    prepare,
    read_manifest,
    valid_records,
    widen_manifest,
    write_manifest,
)

CASES = ("a", "b")


def finished(index, case="a", *, attacked=True):
    """A record with images that tell which they are."""
    record = {"sample_id": f"s{index}", "index": index, "case": case, "status": "found"}
    image = np.full((2, 2, 1), float(index))
    extra = np.full((2, 2, 1), index + CASES.index(case) / 10 + 0.05)
    return Finished(record, image, extra) if attacked else Finished(record, None, None)


def write_all(run_dir, *groups):
    with Writer(run_dir, "main", (0, 1)) as writer:
        for group in groups:
            writer.write(group)


def images_of(run_dir, record):
    name, row = record["array"]
    with np.load(run_dir / "arrays" / name) as arrays:
        return arrays["clean"][arrays["clean_row"][row]], arrays["adversarial"][row]


def check_all(run_dir):
    """Every valid record points to its own images; returns the keys."""
    keys = []
    for record in valid_records(run_dir):
        keys.append((record["case"], record["sample_id"]))
        if record["array"] is not None:
            clean, adversarial = images_of(run_dir, record)
            assert (clean == record["index"]).all()
            assert (adversarial == record["index"] + CASES.index(record["case"]) / 10 + 0.05).all()
    assert len(set(keys)) == len(keys)
    return set(keys)


def test_records_find_their_images_and_clean_images_are_kept_once(tmp_path):
    prepare(tmp_path, 0)
    write_all(tmp_path, [finished(3), finished(1, "b"), finished(3, "b"),
                         finished(2, attacked=False)], [finished(5)])
    assert check_all(tmp_path) == {("a", "s3"), ("b", "s1"), ("b", "s3"), ("a", "s2"), ("a", "s5")}
    assert sorted(os.listdir(tmp_path / "arrays")) == ["main-00000.npz", "main-00001.npz"]
    with np.load(tmp_path / "arrays" / "main-00000.npz") as arrays:
        assert arrays["clean"].shape[0] == 2
        assert arrays["adversarial"].shape[0] == 3


def test_an_array_file_may_be_larger_than_a_plain_zip_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("zipfile.ZIP64_LIMIT", 100)
    prepare(tmp_path, 0)
    write_all(tmp_path, [finished(i) for i in range(9)])
    assert len(check_all(tmp_path)) == 9


def test_a_record_without_its_array_file_does_not_count(tmp_path):
    prepare(tmp_path, 0)
    write_all(tmp_path, [finished(0)], [finished(1)])
    (tmp_path / "arrays" / "main-00001.npz").unlink()
    assert check_all(tmp_path) == {("a", "s0")}
    # A new file must not take the name of the lost one: its record would find other images.
    write_all(tmp_path, [finished(2)])
    assert check_all(tmp_path) == {("a", "s0"), ("a", "s2")}


def test_a_file_is_not_overwritten_where_older_records_are_damaged(tmp_path):
    prepare(tmp_path, 0)
    write_all(tmp_path, [finished(0)], [finished(1)])
    path = tmp_path / "records" / "main.jsonl"
    path.write_bytes(path.read_bytes().replace(b"s0", b"s9"))  # another checksum would belong to it
    write_all(tmp_path, [finished(2)])
    assert check_all(tmp_path) == {("a", "s1"), ("a", "s2")}


def test_a_writer_tidies_up_after_itself_alone(tmp_path):
    """Others may be half-way through theirs."""
    prepare(tmp_path, 0)
    own = ["shard-1-of-3-00007.npz", ".shard-1-of-3-00007.npz.0f.tmp"]
    others = ["shard-1-of-30-00007.npz", ".shard-1-of-30-00007.npz.0f.tmp", "main-00000.npz", ".main-00000.npz.0f.tmp",
              ".shard-1-of-3-notes", "shard-1-of-3-00007.npz.bak"]
    for name in own + others:
        (tmp_path / "arrays" / name).touch()
    with Writer(tmp_path, "shard-1-of-3", (1, 3)):
        assert sorted(os.listdir(tmp_path / "arrays")) == sorted(others)


def test_a_writer_that_cannot_open_its_files_holds_no_lock(tmp_path):
    prepare(tmp_path, 0)
    (tmp_path / "events" / "main.jsonl").mkdir()
    with pytest.raises(StoreError, match="main.jsonl"):
        write_all(tmp_path, [finished(0)])
    (tmp_path / "events" / "main.jsonl").rmdir()
    write_all(tmp_path, [finished(0)])
    assert check_all(tmp_path) == {("a", "s0")}


class Killed(BaseException):
    """Stands for kill -9: nothing but the system calls already made remains."""


def test_killed_between_any_two_system_calls_nothing_is_wrong(tmp_path, monkeypatch):
    """Every os call of a second write is the last one, once; then the writer is started anew."""
    calls = ("write", "fsync", "replace", "open", "ftruncate", "pwrite")
    real = {name: getattr(os, name) for name in calls}
    real_unlink = pathlib.Path.unlink
    monkeypatch.setattr(WriterLock, "_beat", lambda self: None)  # No threads of the dead.
    survived = []
    for last in range(1000):
        files = []
        run_dir = tmp_path / str(last)
        prepare(run_dir, 0)
        write_all(run_dir, [finished(0), finished(1)])
        count = 0

        def counted(name, *args, **kwargs):
            nonlocal count
            count += 1
            if count > last:
                if name == "write":  # Killed half-way through the bytes.
                    real[name](args[0], args[1][:len(args[1]) // 2])
                raise Killed
            result = real[name](*args, **kwargs)
            if name == "open":
                files.append(result)
            return result

        def unlink(path, **kwargs):
            if count <= last:  # A dead process tidies nothing up.
                real_unlink(path, **kwargs)

        for name in calls:
            monkeypatch.setattr(os, name, lambda *a, name=name, **k: counted(name, *a, **k))
        monkeypatch.setattr(pathlib.Path, "unlink", unlink)
        try:
            write_all(run_dir, [finished(2), finished(2, "b")], [finished(3)])
        except Killed:
            pass
        for name in calls:
            monkeypatch.setattr(os, name, real[name])
        monkeypatch.setattr(pathlib.Path, "unlink", real_unlink)
        for file in files:  # The kernel closes a dead process's files, and so frees its lock.
            with contextlib.suppress(OSError):
                os.close(file)
        kept = check_all(run_dir)
        assert {("a", "s0"), ("a", "s1")} <= kept
        write_all(run_dir, [finished(i, case) for i, case in ((2, "a"), (2, "b"), (3, "a"))
                            if (case, f"s{i}") not in kept])
        assert check_all(run_dir) == {("a", "s0"), ("a", "s1"), ("a", "s2"), ("b", "s2"),
                                      ("a", "s3")}
        # Array files without records were removed, and half-written ones.
        used = {r["array"][0] for r in valid_records(run_dir)}
        assert set(os.listdir(run_dir / "arrays")) == used
        survived.append(len(kept))
        if count <= last:
            break
    assert len(survived) > 15  # So many calls there are.
    assert set(survived) >= {2, 4, 5}  # Before, between and after the two writes.


MANIFEST = {"format_version": 1, **dict.fromkeys(
    ("plan", "fingerprint", "cases", "num_samples", "image_shape", "dtype", "bounds", "forced"))}


def test_the_manifest_is_written_once(tmp_path):
    prepare(tmp_path, 0)
    assert write_manifest(tmp_path, MANIFEST | {"who": "first"})
    assert not write_manifest(tmp_path, MANIFEST | {"who": "second"})
    assert read_manifest(tmp_path)["who"] == "first"


def test_the_manifest_grows_and_never_shrinks(tmp_path):
    write_manifest(tmp_path, MANIFEST | {"cases": [{"name": "a"}], "num_samples": 5})
    for cases, num_samples, names, most in (("a", 3, "a", 5), ("a", 8, "a", 8), ("ba", 2, "ab", 8), ("c", 9, "abc", 9)):
        widen_manifest(tmp_path, [{"name": name} for name in cases], num_samples)
        assert read_manifest(tmp_path) == MANIFEST | {"num_samples": most, "cases": [{"name": name} for name in names]}


@pytest.mark.parametrize(("content", "message"), [
    ("{", "damaged"), ("[]", "damaged"), ('{"format_version": 1}', "damaged .without plan.; restore it"), ('{"format_version": 0}', "version 0, this gse_jax"),
    ('{"format_version": 99}', "version 99, this gse_jax")])
def test_a_damaged_manifest_is_told_in_one_line(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_manifest(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        read_manifest(tmp_path / "nowhere")


def test_a_directory_that_is_made_holds_nothing(tmp_path):
    """Whether it can be written to is tried out, and no trace of that is left."""
    prepare(tmp_path / "deep" / "run", 0)
    assert [path for path in (tmp_path / "deep").rglob("*") if path.is_file()] == []


def test_no_room_on_the_disk_is_told_before_anything_is_computed(tmp_path):
    with pytest.raises(StoreError, match="MiB of free disk.*free some space"):
        prepare(tmp_path, 1 << 60)


def test_room_for_records_and_events_is_left_on_the_disk(tmp_path, monkeypatch):
    free = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[-1]))
    free.append(100 + (16 << 20))
    prepare(tmp_path, 100)
    free.append(99 + (16 << 20))
    with pytest.raises(StoreError, match="MiB of free disk"):
        prepare(tmp_path, 100)


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match="cannot write .*run"):
        prepare(tmp_path / "run", 0)
