"""scripts/merge.py and the card that it writes."""

import importlib.util
import json

import pytest
from golden.helpers import tiny_folder, tiny_model

from phi3v.model import Phi3VForCausalLM
from phi3v.model.adapters import add_lora, model_card, save_adapter
from phi3v.provenance.manifest import parent_file, write_manifest


@pytest.fixture(scope="module")
def merge_main(root):
    spec = importlib.util.spec_from_file_location("merge_script", root / "scripts" / "merge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A training run's folder: the manifest above, the adapter in final/."""
    run = tmp_path_factory.mktemp("run")
    save_adapter(add_lora(tiny_model(), 4, 8, seed=0), run / "final")
    settings = {
        "model_name_or_path": "/somewhere/models/base",
        "use_lora": True,
        "lora_rank": 4,
        "note": "a|b",
        "x": None,
    }
    inputs = {"model": str(tiny_folder())}
    write_manifest(run, kind="train", settings=settings, inputs=inputs, seed=7, seconds=12.0, device="a CPU")
    return run


def test_merge_script_writes_weights_processor_and_card(merge_main, run_folder, tmp_path, capsys):
    assert merge_main(["--adapter", str(run_folder / "final"), "--out", str(tmp_path / "mine")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["top_token_agreement"] == 1.0
    Phi3VForCausalLM.from_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    manifest = json.loads((run_folder / "manifest.json").read_text())
    assert card.startswith("---\nlicense: mit\n")
    assert f"base_model: {tiny_folder().name}" in card
    assert "| lora_rank | 4 |" in card
    crops = json.loads((tmp_path / "mine" / "preprocessor_config.json").read_text())["num_crops"]
    assert f"at most {crops} tiles" in card
    assert "| model_name_or_path | base |" in card
    assert "| note | a\\|b |" in card
    assert "| x |" not in card
    assert f"torch {manifest['versions']['torch']}" in card
    assert "Device: a CPU" in card
    assert f"host: {manifest['host']}" not in card
    assert "/somewhere" not in card


def test_merge_script_refuses_in_one_line(merge_main, run_folder, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert merge_main(["--adapter", str(run_folder / "final"), "--out", str(tmp_path / "there")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    for arguments in (
        ["--adapter", str(tmp_path)],
        ["--adapter", str(run_folder / "final"), "--manifest", "none.json"],
    ):
        with pytest.raises(SystemExit):
            merge_main([*arguments, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_a_card_without_manifest_says_so(tmp_path):
    assert parent_file(tmp_path, ["manifest.json"]) is None
    assert "no manifest" in model_card("m", "base", None, None, num_crops=4)
