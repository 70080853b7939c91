"""What the pages assume a reader has: small files, a model, finished results."""

import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_examples import picture_bytes, write_clip, write_parquet

GPU = "needs a GPU and the published weights"
SLURM = "needs a cluster; tests/slurm runs it on one"
NETWORK = "needs the network; make verify-pristine runs it"
NOT_RUN: dict[tuple[str, str], str] = {
    ("docs/how-to/conda.md", "snakemake --profile"): "verify-conda runs it over rattler; conda-forge is not reachable",
    (
        "docs/how-to/containers.md",
        "make containers\n",
    ): "verify-containers builds with buildah; no registry is reachable",
    ("docs/how-to/containers.md", "snakemake --profile"): "verify-containers runs it; needs images",
    ("docs/how-to/containers.md", "apptainer build"): "verify-containers converts archives; needs Apptainer",
    ("docs/how-to/containers.md", "docker build"): "needs Docker",
    ("docs/how-to/containers.md", "mkdir layout"): "verify-containers runs it; needs Charliecloud",
    ("docs/how-to/containers.md", "make containers ARGS"): "verify-containers builds with such options",
    ("README.md", "make demo"): "takes minutes; the tutorial's small demo runs it",
    ("README.md", "snakemake"): GPU,
    ("README.md", "python scripts/cluster.py site"): SLURM,
    ("CONTRIBUTING.md", "git clone"): NETWORK,
    ("CONTRIBUTING.md", "make check"): "takes minutes; the continuous integration runs it",
    ("CONTRIBUTING.md", "python -m tests.fakegpu"): "make verify-gpu",
    ("docs/explanation/reproducibility.md", "make reproduce"): "takes minutes",
    ("docs/how-to/chat.md", "make chat"): "serves until it is stopped; tests/test_evaluation_chat.py",
    ("docs/how-to/cite.md", "python scripts/provenance.py"): "needs a finished run; tests/test_provenance_lineage.py",
    ("docs/how-to/convert-documents.md", "pip install"): NETWORK,
    ("docs/how-to/offline.md", "snakemake data"): "needs the network; tests/environments/test_supply.py",
    ("docs/how-to/public-benchmarks.md", "tests/clients/install.sh"): "2.4 GB; make clients",
    ("docs/how-to/public-benchmarks.md", "python -m lmms_eval"): "tests/clients/test_lmms_eval.py",
    ("docs/how-to/public-benchmarks.md", "accelerate launch"): "tests/clients/test_lmms_eval.py",
    ("docs/how-to/serve.md", "vllm serve"): "tests/clients/test_vllm.py",
    ("docs/how-to/serve.md", "import base64"): "needs a server; tests/clients/test_vllm.py",
    ("docs/how-to/serve.md", "from mistralrs"): "tests/clients/test_mistral.py",
    ("docs/how-to/slurm-events.md", "snakemake"): SLURM,
    ("docs/how-to/slurm-site.md", "python scripts/cluster.py site"): SLURM,
    ("docs/how-to/slurm-site.md", "python scripts/cluster.py check"): SLURM,
    ("docs/how-to/small-gpu.md", "python scripts/download.py"): GPU,
    ("docs/how-to/tune.md", "python scripts/finetune.py …"): "parts of commands; tests/test_training_own_data.py",
    ("docs/troubleshooting.md", "python3.11 -m venv"): "needs the network and an older GPU",
    ("docs/tutorials/demo.md", "git clone"): NETWORK,
    ("docs/tutorials/demo.md", "make chat"): "serves until it is stopped; tests/test_evaluation_chat.py",
    ("docs/tutorials/slurm.md", "git clone"): NETWORK,
    ("docs/tutorials/slurm.md", "python scripts/cluster.py site"): SLURM,
    ("docs/tutorials/slurm.md", "cp config/config.yaml"): "opens an editor",
    ("docs/tutorials/slurm.md", "python scripts/cluster.py check"): SLURM,
    ("docs/tutorials/slurm.md", "tmux new"): SLURM,
    ("docs/tutorials/slurm.md", "make slurm-status"): SLURM,
}
"""(page, start of the block) to the reason why no test runs it."""


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_pictures(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if name.endswith("jpg") else "PDF" if name.endswith("pdf") else "PNG"
        (folder / name).write_bytes(picture_bytes(number, kind))


def repository(request: pytest.FixtureRequest) -> None:
    """The copy itself, with an environment that make finds."""
    Path(".venv").symlink_to(sys.prefix)


def files(request: pytest.FixtureRequest) -> None:
    """A few rows in each format that people have."""
    repository(request)
    options = ["0.2 MPa", "0.4 MPa"]
    gauge = {"question": "What does the gauge read?", "options": options}
    write_pictures(Path("gauges"), *(f"g{k}.png" for k in range(10)))
    write_lines(
        Path("gauges/all.jsonl"),
        [{**gauge, "image": f"./g{k}.png", "answer": options[k % 2], "kind": f"type{k % 2}"} for k in range(10)],
    )
    write_pictures(Path("xrays/images"), *(f"p{k}.png" for k in range(5)))
    rows = [
        {"qid": k, "img_id": f"images/p{k % 5}.png", "patient_id": k % 5, "question": "Clear?", "answer": "no"}
        for k in range(10)
    ]
    Path("xrays/vqa.json").write_text(json.dumps(rows))
    Path("latex").mkdir()
    for split in ("train", "validation"):
        picture = {"bytes": picture_bytes(1, "PNG"), "path": "1.png"}
        write_parquet(Path(f"latex/{split}-0.parquet"), [{"image": picture, "text": r"\frac{a}{b}"}])
    chat = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A lamp."}]
    write_lines(Path("chats/train.jsonl"), [{"messages": chat, "images": ["0.png"]}])
    write_pictures(Path("chats"), "0.png")
    write_pictures(Path("birds/train"), "owl/0.png", "owl/1.png", "wren/2.png")
    write_pictures(Path("receipts/scans"), *(f"r{k}.jpg" for k in range(5)))
    Path("receipts/fields").mkdir()
    for number in range(5):
        Path(f"receipts/fields/r{number}.json").write_text(json.dumps({"shop": "Café", "total": number}))
    write_pictures(Path("papers"), "a.pdf")
    Path("papers/questions.csv").write_text("image,page,question,answer\na.pdf,1,What is it?,noise\n")
    write_clip(Path("clips/a.mp4"), 20)
    Path("clips/questions.csv").write_text("video,question,answer\na.mp4,What is it?,grey\n")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Nothing on the screen."""


def web(request: pytest.FixtureRequest) -> None:
    """A table whose pictures are on a web server of this machine; one is gone."""
    repository(request)
    write_pictures(Path("web"), *(f"{k}.png" for k in range(9)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory="web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    request.addfinalizer(server.server_close)
    request.addfinalizer(server.shutdown)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    rows = [
        {"title": f"Lamp {k}", "full_price": f"€ {k}.50", "image_url": f"{url}/{k}.png", "shop": f"s{k // 2}"}
        for k in range(10)
    ]
    Path("prices").mkdir()
    write_parquet(Path("prices/data.parquet"), rows)


def scored(request: pytest.FixtureRequest) -> None:
    """A finished evaluation of four questions."""
    repository(request)
    common = {"prompt": "?", "images": [], "answers": ["yes"], "score": 1.0}
    rows = [{**common, "id": f"e{k}", "prediction": ["yes", "no"][k % 2]} for k in range(4)]
    write_lines(Path("evaluated/after/predictions.jsonl"), rows)
    Path("evaluated/after/metrics.json").write_text("{}")


def trained(request: pytest.FixtureRequest) -> None:
    """A tiny checkpoint, data that it can train on, and new pictures."""
    from training_fixtures import write_data, write_model

    repository(request)
    write_data(Path("my_data"))
    write_model(Path("model"))
    write_pictures(Path("scans"), "a.png", "more/b.png")
    Path("new.csv").write_text("number,photo,prompt\n7,a.png,Which colour is the square ?\n")


def merged(request: pytest.FixtureRequest) -> None:
    """A merged model, and a page."""
    trained(request)
    Path("merged").mkdir()
    Path("model").rename("merged/my-model")
    write_pictures(Path(), "page.png")


def adapter(request: pytest.FixtureRequest) -> None:
    """The adapter of a finished row, and a page."""
    from training_fixtures import train_here

    trained(request)
    values = {"use_lora": True, "lora_rank": 4, "max_steps": 1, "batch_size": 2, "micro_batch_size": 1}
    train_here(Path(), Path("results/my/train/my-lora"), data_dir="my_data", **values)


SETUPS: dict[str, Callable[[pytest.FixtureRequest], None]] = {
    "repository": repository,
    "files": files,
    "web": web,
    "scored": scored,
    "trained": trained,
    "adapter": adapter,
    "merged": merged,
}
"""Name of a marker to what it adds to a copy of the repository, which is the working folder."""
