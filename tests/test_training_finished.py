"""What is kept of a finished row, and when it is taken instead of training again."""

import json
import shutil

import pytest

from phi3v.training import finished

SETTINGS = {"learning_rate": 1e-3, "data": "d1"}


@pytest.fixture
def output(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final/model.safetensors").write_bytes(b"weights")
    (tmp_path / "final/.snakemake_timestamp").touch()
    (tmp_path / "manifest.json").write_text('{"kind": "train"}')
    assert finished.keep(tmp_path, 3, SETTINGS) == ""
    return tmp_path


def lose(output):
    """What Snakemake does before a job starts."""
    shutil.rmtree(output / "final")
    (output / "manifest.json").unlink()


def test_it_takes_no_room_and_comes_back(output):
    assert (output / "final/model.safetensors").stat().st_nlink == 2
    for _ in range(2):
        lose(output)
        assert finished.restore(output, SETTINGS, merged=False)
        assert (output / "final/model.safetensors").read_bytes() == b"weights"
        assert json.loads((output / "manifest.json").read_text()) == {"kind": "train"}
        assert not (output / "final/.snakemake_timestamp").exists()


@pytest.mark.parametrize("change", ["settings", "bytes", "missing"])
def test_it_does_not_come_back_if_anything_differs(output, change):
    if change == "bytes":  # through the link, as a file edited in place
        (output / "final/model.safetensors").write_bytes(b"another")
    if change == "missing":
        (output / ".finished/manifest.json").unlink()
    lose(output)
    settings = SETTINGS | ({"learning_rate": 2e-3} if change == "settings" else {})
    assert not finished.restore(output, settings, merged=False)
    assert not (output / "final").exists()
    assert not (output / ".finished").exists()


def test_a_merged_model_that_is_gone_needs_training(output):
    lose(output)
    assert not finished.restore(output, SETTINGS, merged=True)
    (output / "merged").mkdir()
    assert finished.restore(output, SETTINGS, merged=True)


def test_without_hard_links_it_says_why(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    (tmp_path / "final").mkdir()
    (tmp_path / "final/a").touch()
    monkeypatch.setattr("os.link", refuse)
    assert "Operation not permitted" in finished.keep(tmp_path, 1, SETTINGS)
    assert not list(tmp_path.glob(".finished*"))
