"""`gse-jax prepare` and `convert` as a user types them."""

from safetensors.numpy import load_file
from tests.data.test_cifar import official, official100
from tests.models.test_torch_checkpoint import REAL, archive

from gse_jax import cli, data, models
from gse_jax.cli import options


def test_prepare_writes_an_npz_that_the_other_commands_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    official(tmp_path / "a.tar.gz")
    assert cli.main(["prepare", "cifar10", "--archive", "a.tar.gz"]) == 0
    assert "cifar10_test.npz (3 images); use it as --data npz:cifar10_test.npz" in (
        capsys.readouterr().out)
    assert data.load("npz:cifar10_test.npz").ids == ("test_00000", "test_00001", "test_00002")
    assert cli.main(["prepare", "cifar10", "--archive", "a.tar.gz", "--split", "train", "--out",
                     "train.npz"]) == 0
    assert len(data.load("npz:train.npz").ids) == 15
    official100(tmp_path / "b.tar.gz")
    assert cli.main(["prepare", "cifar100", "--archive", "b.tar.gz"]) == 0
    assert "cifar100_test.npz (6 images)" in capsys.readouterr().out
    assert len(data.load("npz:cifar100_test.npz").class_names) == 100


def test_convert_writes_safetensors(tmp_path, capsys):
    assert cli.main(["convert", str(REAL), "--out", str(tmp_path / "w.safetensors")]) == 0
    assert "(17 tensors)" in capsys.readouterr().out
    assert "0.weight" in load_file(tmp_path / "w.safetensors")


def test_a_refused_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    evil = archive(tmp_path / "evil.pth", b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.")
    out = tmp_path / "out"
    for arguments, words in (
            (["convert", str(evil), "--out", str(out)], "os.system"),
            (["convert", "/nowhere.pth", "--out", str(out)], "/nowhere.pth"),
            (["convert", str(REAL), "--out", str(tmp_path / "no/w")], "create it first"),
            (["prepare", "cifar10", "--archive", str(evil), "--out", str(out)], "no tar archive")):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not out.exists()


def test_presets_of_the_command_line_are_those_of_the_library():
    for name, pair in models.NORMALIZATIONS.items():
        assert options.normalization(name) == pair
