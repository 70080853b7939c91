"""Data that several runs share: converted once, and again only if contents change."""

import os
import shutil

import pytest
import small_run
from data_examples import picture_bytes

from phi3v.settings import Dataset, dataset_key, read_entries

DIGITS = ("--configfile", "config/digits.yaml")


@pytest.fixture(scope="module")
def shared(root, tmp_path_factory):
    """(folder, dataset.json of the digits), their source a folder of the user's, converted by the demo's run."""
    folder = small_run.copy(root, tmp_path_factory.mktemp("shared"))
    (folder / "mine").mkdir()
    for number in range(4):
        (folder / f"mine/{number}.png").write_bytes(picture_bytes(number, "PNG"))
    for name in ("train", "val"):
        lines = [f"{number}.png\tWhich?\t{number}\n" for number in range(4)]
        (folder / f"mine/{name}.tsv").write_text("image\tquestion\tanswer\n" + "".join(lines))
    entries = folder / "config/digits/datasets.yaml"
    entries.write_text(entries.read_text().replace("file:results/digits-source", "file:mine"))
    entry = read_entries(["config/digits/datasets.yaml"], Dataset, folder)["digits"]
    target = f"results/data/{dataset_key('digits', entry)}/dataset.json"
    code, output, _ = small_run.snakemake(folder, target)
    assert code == 0, output
    return folder, target


def plan(folder, *arguments):
    code, output, _ = small_run.snakemake(folder, "-n", *arguments)
    assert code == 0, output
    return small_run.planned(output)


def test_the_other_run_has_nothing_to_do(shared):
    folder, target = shared
    assert plan(folder, target) == {}
    assert plan(folder, target, *DIGITS) == {}


def test_an_edited_picture_is_converted_again_and_a_touched_one_is_not(shared):
    folder, target = shared
    one, other = folder / "mine/1.png", folder / "mine/2.png"
    before = (folder / target).stat().st_mtime_ns
    os.utime(one, (2e9, 2e9))
    assert plan(folder, target) == {}
    assert plan(folder, target, *DIGITS) == {}
    shutil.copyfile(other, one)
    assert {"download_data", "convert"} <= plan(folder, target, *DIGITS).keys()
    code, output, _ = small_run.snakemake(folder, target, *DIGITS)
    assert code == 0, output
    assert (folder / target).stat().st_mtime_ns != before
    assert ((folder / target).parent / "images/train/1.png").read_bytes() == other.read_bytes()
    assert plan(folder, target) == {}
