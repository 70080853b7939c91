"""A row in a container on SLURM, with an image that `make verify-containers` built."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cluster_run import ROW


@pytest.mark.verify
@pytest.mark.skipif("PHI3V_IMAGES" not in os.environ, reason="PHI3V_IMAGES: no folder with images of verify-containers")
def test_each_job_is_inside_its_image(runs):
    images = Path(os.environ["PHI3V_IMAGES"])
    for path in images.glob("*.sif"):
        (runs.folder / "containers" / path.name).symlink_to(path)
        shutil.copy2(path.with_suffix(".sif.sha256"), runs.folder / "containers")
    config = runs.configure("contained", [ROW["lora"]])
    code, output = runs.run(config, "--sdm", "apptainer")
    assert code == 0, output[-8000:]
    for folder in ("train", "evaluate"):
        values = json.loads((runs.folder / f"results/contained/{folder}/{ROW['lora']}/manifest.json").read_text())
        container = values["environment"]["container"]
        assert Path(container["image"]).resolve() == (images / "train.sif").resolve()
        assert container["sha256"] == (images / "train.sif.sha256").read_text().split()[0]
        assert values["slurm_job"]
