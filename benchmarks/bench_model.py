"""Speed of the model on a CPU, beside the published code's figures on the same workloads.

    python benchmarks/bench_model.py                           # everything, 2 threads, medians of 5
    python benchmarks/bench_model.py --only train generate --repeats 3
    python benchmarks/bench_model.py --small                   # 2 layers and 10 pages: one to two minutes, to compare two checkouts
    python benchmarks/bench_model.py --profile train_full      # where the time of a step goes
    python benchmarks/bench_model.py --write_full_size FOLDER  # a random checkpoint of the published size, 8.3 GB
    python benchmarks/bench_model.py --run_full_size FOLDER    # load it and run one forward pass: time and peak memory

Workloads and reference figures: tests/golden/README.md, "How fast the official code is". Prints JSON. A figure is only
worth something on an idle machine: the load before and after stands in the output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

# Medians of the published code on a machine like the one the goals were set for (tests/golden/README.md).
OFFICIAL: dict[str, Any] = {
    "processor": {"images_per_second": 11.1, "goal": 3.0},
    "train_full": {"seconds": 6.48, "goal": 1.3},
    "train_frozen": {"seconds": 2.67, "goal": 1.35},
    "train_padded_tiles": {"seconds": 10.1, "goal": 2.0},
    "train_text": {"seconds": 3.06, "seconds_without_dummy_vision": 1.56},
    "generate": {"seconds": 2.42, "goal": 1.5},
    "peak_rss_gib": 3.9,
}


def build_model(layers: int) -> Any:
    """Decoder 512 wide, CLIP 1024 wide, `layers` (the published figures: 8) each; weights by name as in the golden data."""
    import torch
    from golden.golden_common import make_weight

    from phi3v.model import Phi3VConfig, Phi3VForCausalLM

    spec = json.loads((ROOT / "tests/golden/state_dict_tiny.json").read_text())["tiny_mha"]["text"]
    official = ROOT / "tests/golden/rope_factors.json"
    factors = json.loads(official.read_text())
    chosen = {key: [factors[key][i * 48 // 32] for i in range(32)] for key in ("short_factor", "long_factor")}
    config = Phi3VConfig.from_dict(
        {
            **spec,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "rope_scaling": {"type": "su", **chosen},
            "vision_config": {"num_hidden_layers": layers, "intermediate_size": 1024},
        }
    )
    config._attn_implementation = "sdpa"
    model = Phi3VForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(make_weight(name, parameter.shape)))
    return model


def page_batch(num_crops: int) -> dict[str, Any]:
    """The page with its prompt and answer, labels on the answer. Ids are stand-ins of the right number (no tokenizer
    is needed for speed): 15 before and after the picture, 18 of the answer."""
    import torch
    from golden.golden_common import make_image, text_ids

    from phi3v.model import Phi3VImageProcessor

    out = Phi3VImageProcessor(num_crops=num_crops)(make_image(1700, 2200, 0))
    head, tail, answer = text_ids(4, 1), text_ids(13, 2), text_ids(18, 3)
    image = [32044] * out["num_img_tokens"][0]
    ids = torch.tensor([[*head, *image, *tail, *answer]])
    labels = torch.full_like(ids, -100)
    labels[:, -len(answer) :] = ids[:, -len(answer) :]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": out["pixel_values"],
        "image_sizes": out["image_sizes"],
        "labels": labels,
    }


def forward_flops(model: Any, batch: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations of one forward pass by part: 2 a multiply-add, causal attention at half."""
    config, vision = model.config, model.config.vision_config
    tokens = batch["input_ids"].shape[1]
    labels = int((batch["labels"][:, 1:] != -100).sum()) if "labels" in batch else 1
    kv = config.num_key_value_heads * config.head_dim
    per_token = (
        2 * config.hidden_size**2 + 2 * config.hidden_size * kv + 3 * config.hidden_size * config.intermediate_size
    )
    parts = {
        "decoder": 2.0 * tokens * config.num_hidden_layers * per_token
        + 2.0 * tokens**2 * config.hidden_size * config.num_hidden_layers,
        "head": 2.0 * labels * config.hidden_size * config.vocab_size,
        "clip": 0.0,
        "projector": 0.0,
    }
    if "pixel_values" in batch:
        tiles, width = len(batch["pixel_values"]), vision.hidden_size
        patches = (vision.image_size // vision.patch_size) ** 2
        layer = (
            2.0 * (patches + 1) * (4 * width**2 + 2 * width * vision.intermediate_size)
            + 4.0 * (patches + 1) ** 2 * width
        )
        parts["clip"] = tiles * (
            (vision.num_hidden_layers - 1) * layer + 2.0 * patches * 3 * vision.patch_size**2 * width
        )
        merged = tiles * patches / 4 + 2
        parts["projector"] = 2.0 * merged * (4 * width * config.hidden_size + config.hidden_size**2)
    return parts


def timed(action: Callable[[], Any], repeats: int, warmup: int = 1) -> dict[str, Any]:
    """Median, extremes and all timings of `action` in seconds."""
    for _ in range(warmup):
        action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "all": [round(s, 3) for s in seconds]}


def matrix_product_rate(repeats: int) -> float:
    """GFLOP/s of float32 products of the two shapes that carry most of a step."""
    import torch

    rates = []
    for m, k, n in ((2885, 1024, 1024), (792, 512, 1536)):
        left, right = torch.randn(m, k), torch.randn(k, n)
        count = max(1, int(2e10 / (2 * m * k * n)))
        result = timed(lambda a=left, b=right, c=count: [a @ b for _ in range(c)], repeats)  # type: ignore[misc]
        rates.append(2e-9 * m * k * n * count / result["seconds"])
    return max(rates)


def bench_processor(repeats: int, calls: int, **_: Any) -> dict[str, Any]:
    """Pages of 1700 x 2200 pixels at num_crops 16, in `calls` of 10, and 10 of them one by one."""
    from golden.golden_common import make_image
    from PIL import Image

    from phi3v.model import Phi3VImageProcessor

    processor = Phi3VImageProcessor(num_crops=16)
    pages = [make_image(1700, 2200, seed) for seed in range(4)]
    batch = [pages[i % 4] for i in range(10)]

    def in_calls(as_uint8: bool = False) -> None:
        for _ in range(calls):
            processor(batch, as_uint8=as_uint8)

    result = timed(in_calls, repeats)
    small = timed(lambda: in_calls(as_uint8=True), repeats)
    single = timed(lambda: [processor(page) for page in batch], repeats)
    floor = timed(
        lambda: [
            pages[i % 4].transpose(Image.Transpose.TRANSPOSE).resize((1344, 1038), Image.Resampling.BILINEAR)
            for i in range(10 * calls)
        ],
        repeats,
    )
    return {
        "images_per_second": round(10 * calls / result["seconds"], 2),
        "images_per_second_as_uint8": round(10 * calls / small["seconds"], 2),
        "images_per_second_one_by_one": round(10 / single["seconds"], 2),
        "floor_images_per_second_pil_transpose_and_resize": round(10 * calls / floor["seconds"], 2),
        "all": result["all"],
    }


def bench_step(
    repeats: int, model: Any, rate: float, batch: dict[str, Any], frozen: bool = False, **_: Any
) -> dict[str, Any]:
    """Forward and backward with pixel values ready, no optimizer."""
    from phi3v.model.modeling import freeze

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.model.vision_embed_tokens.img_processor.vision_model.freeze_unused()
    if frozen:  # the reference froze CLIP alone: projector and separators train
        freeze(model, ["clip", "projector", "separators"])
        for name, parameter in model.named_parameters():
            if "img_processor" not in name:
                parameter.requires_grad_(True)
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    result = timed(step, repeats)
    flops = forward_flops(model, batch)
    total = sum(value * (1 if frozen and part == "clip" else 3) for part, value in flops.items())
    achieved = total / result["seconds"] / 1e9
    return {
        **result,
        "tokens": batch["input_ids"].shape[1],
        "gflop": round(total / 1e9, 1),
        "gflop_per_second": round(achieved, 1),
        "of_matrix_product_rate": round(achieved / rate, 3) if rate else None,
    }


def bench_generate(repeats: int, model: Any, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
    """32 new tokens after the page."""
    model.eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    cut = batch["input_ids"].shape[1] - 18
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :cut], inputs["attention_mask"][:, :cut]
    result = timed(lambda: model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None), repeats)
    prefill = timed(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None), repeats)
    return {**result, "prefill_seconds": prefill["seconds"], "prompt_tokens": cut}


def full_size_config() -> Any:
    """The published geometry."""
    from phi3v.model import Phi3VConfig

    factors = json.loads((ROOT / "tests/golden/rope_factors.json").read_text())
    return Phi3VConfig(rope_scaling={"type": "su", **factors}, architectures=["Phi3VForCausalLM"], dtype="bfloat16")


def write_full_size(folder: Path) -> None:
    """Random bfloat16 weights of the published size, shard by shard, so that memory stays small."""
    import torch
    from safetensors.torch import save_file

    from phi3v.model import Phi3VForCausalLM

    config = full_size_config()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Phi3VForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def close() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        norm = name.endswith("norm.weight") or "layer_norm" in name or "layrnorm" in name
        values = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)
        shard[name] = values.add_(1) if norm and name.endswith(".weight") else values
        size, total = size + values.numel() * 2, total + values.numel() * 2
        if size > 1e9:
            close()
            size = 0
    if shard:
        close()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(json.dumps({"folder": str(folder), "gigabytes": round(total / 1e9, 2), "tensors": len(weight_map)}))


def run_full_size(folder: Path) -> None:
    """Load and run one forward pass over a picture of one tile; prints seconds and the process's peak memory."""
    import torch
    from golden.golden_common import make_image, text_ids

    from phi3v.model import Phi3VForCausalLM, Phi3VImageProcessor

    start = time.perf_counter()
    model = Phi3VForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    loaded = time.perf_counter()
    out = Phi3VImageProcessor(num_crops=1)(make_image(336, 336))
    ids = torch.tensor([[*text_ids(8, 1), *[32044] * out["num_img_tokens"][0], *text_ids(8, 2)]])
    with torch.inference_mode():
        pixels = {"pixel_values": out["pixel_values"], "image_sizes": out["image_sizes"]}
        logits = model(ids, **pixels, use_cache=False, logits_to_keep=1).logits
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "load_seconds": round(loaded - start, 1),
        "forward_seconds": round(time.perf_counter() - loaded, 1),
        "tokens": ids.shape[1],
        "finite": bool(torch.isfinite(logits).all()),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "load_average": os.getloadavg(),
    }
    print(json.dumps(report, indent=2))


def profile(name: str, jobs: dict[str, Callable[..., Any]]) -> None:
    """Print the operators that take the time of one run of `name`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    jobs[name](repeats=1)
    with profiler(activities=[ProfilerActivity.CPU]) as record:
        jobs[name](repeats=1)
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


def main() -> None:
    """Run the chosen workloads and print their JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of workload names (default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="2 layers and 10 pages; no comparison with published figures"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", help="print where one workload's time goes instead")
    parser.add_argument("--write_full_size", type=Path, metavar="FOLDER")
    parser.add_argument("--run_full_size", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch
    import transformers
    from golden.golden_common import text_ids

    torch.set_num_threads(arguments.threads)
    if arguments.write_full_size or arguments.run_full_size:
        if arguments.write_full_size:
            write_full_size(arguments.write_full_size)
        if arguments.run_full_size:
            run_full_size(arguments.run_full_size)
        return
    load_before = os.getloadavg()
    rate = matrix_product_rate(arguments.repeats)
    model = build_model(2 if arguments.small else 8)
    page = page_batch(4)
    ids = torch.tensor([text_ids(1024, 4)])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    jobs: dict[str, Callable[..., Any]] = {
        "processor": lambda repeats: bench_processor(repeats, 1 if arguments.small else 5),
        "train_full": lambda repeats: bench_step(repeats, model, rate, page),
        "train_frozen": lambda repeats: bench_step(repeats, model, rate, page, frozen=True),
        "train_padded_tiles": lambda repeats: bench_step(repeats, model, rate, page_batch(8)),
        "train_text": lambda repeats: bench_step(repeats, model, rate, text),
        "generate": lambda repeats: bench_generate(repeats, model, page),
    }
    if arguments.profile:
        profile(arguments.profile, jobs)
        return
    results: dict[str, Any] = {}
    for name, job in jobs.items():
        if arguments.only and not any(name.startswith(chosen) for chosen in arguments.only):
            continue
        result, reference = job(repeats=arguments.repeats), OFFICIAL[name]
        if arguments.small:
            results[name] = result
            continue
        if "images_per_second" in result:
            result["speed_up"] = round(result["images_per_second"] / reference["images_per_second"], 2)
        else:
            result["speed_up"] = round(reference["seconds"] / result["seconds"], 2)
        results[name] = {**result, "official": reference}
    report = {
        "matrix_product_gflop_per_second": round(rate, 1),
        "workloads": results,
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "official_peak_rss_gib": OFFICIAL["peak_rss_gib"],
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
