"""Evaluation in batches against one example at a time: examples a second, and whether the answers are the same.

    OMP_NUM_THREADS=2 python benchmarks/bench_evaluation.py --size tiny --examples 64 --batch 16
    OMP_NUM_THREADS=2 python benchmarks/bench_evaluation.py --size mid --examples 32 --batch 16 --dtype bf16

A random model and drawn pages; prints JSON. Each answer that differs is generated again both ways, and shown with the
first step where the two part: the gap between the two best logits there, and how far the logits of both ways are apart.
"""

import argparse
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 96,
        "layers": 3,
        "heads": 4,
        "vision_hidden_size": 64,
        "vision_layers": 3,
        "vision_heads": 4,
    },
    "mid": {
        "hidden_size": 768,
        "layers": 12,
        "heads": 12,
        "vision_hidden_size": 256,
        "vision_layers": 5,
        "vision_heads": 4,
        "tile_size": 112,
        "patch_size": 14,
    },
}
WORDS = [
    "total",
    "date",
    "of",
    "the",
    "invoice",
    "letter",
    "signed",
    "page",
    "sum",
    "who",
    "when",
    "where",
    "which",
    "number",
    "name",
    "place",
    "year",
    "amount",
]


def write_pages(folder: Path, count: int) -> Path:
    """A data folder of `count` pages of different shapes with questions of different lengths."""
    from PIL import Image, ImageDraw

    rng = Random(0)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        page = Image.new("RGB", (300 + 40 * rng.randrange(8), 300 + 60 * rng.randrange(8)), "white")
        for y in range(10, page.height - 20, 24):
            ImageDraw.Draw(page).text((10, y), " ".join(rng.choices(WORDS, k=6)), fill="black")
        page.save(folder / "images" / f"{i}.png")
        question = " ".join(rng.choices(WORDS, k=rng.randrange(4, 30))) + " ?"
        turn = {"images": [f"{i}.png"], "user": question, "assistant": rng.choice(WORDS)}
        lines.append(json.dumps({"id": f"page-{i:04d}", "source": "bench", "conversations": [turn]}))
    (folder / "val.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def answer(loaded: Any, questions: list[Any], data: Any, rows: list[int], limit: int) -> tuple[Any, Any]:
    """(tokens [rows, steps], logits [steps, rows, vocabulary]) that the model gives to examples in one batch."""
    import torch

    images = [[data.open(path, path) for path in questions[i].images] for i in rows]
    inputs = loaded.prepare([questions[i].prompt for i in rows], images)
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    with torch.inference_mode():
        made = loaded.model.generate(
            **inputs, do_sample=False, max_new_tokens=limit, eos_token_id=loaded.end_tokens, output_logits=True,
            pad_token_id=loaded.processor.tokenizer.pad_token_id, return_dict_in_generate=True,
            suppress_tokens=[loaded.model.config.image_token_id],
        )  # fmt: skip
    logits = torch.stack(made.logits).float()
    logits[..., loaded.model.config.image_token_id] = float("-inf")
    return made.sequences[:, inputs["input_ids"].shape[1] :], logits


def gap(logits: Any) -> float:
    """Between the two best of [vocabulary] logits."""
    best = logits.topk(2).values
    return float(best[0] - best[1])


def apart(left: Any, right: Any) -> float:
    """Largest difference of finite logits."""
    finite = left.isfinite() & right.isfinite()
    return float((left - right)[finite].abs().max())


def explain(loaded: Any, questions: list[Any], data: Any, batch: list[int], index: int, limit: int) -> dict[str, Any]:
    """Where the answer of one example parts between its batch and the example alone."""
    together, logits = answer(loaded, questions, data, batch, limit)
    alone, alone_logits = answer(loaded, questions, data, [index], limit)
    at = batch.index(index)
    pairs = zip(together[at].tolist(), alone[0].tolist(), strict=False)
    step = next((i for i, (left, right) in enumerate(pairs) if left != right), None)
    if step is None:
        return {"id": questions[index].id, "step": None}
    return {
        "id": questions[index].id,
        "step": step,
        "gap_batched": gap(logits[step, at]),
        "gap_alone": gap(alone_logits[step, 0]),
        "logits_apart": max(apart(logits[i, at], alone_logits[i, 0]) for i in range(step + 1)),
        "largest_logit": float(alone_logits[step, 0].max()),
    }


def first_step(loaded: Any, questions: list[Any], data: Any, batches: list[list[int]]) -> dict[str, float]:
    """Of the first token, where both ways have read the same: how far logits are apart, and the smallest gaps to be lost."""
    apart_by, gaps = [], []
    for batch in batches:
        _, logits = answer(loaded, questions, data, batch, 1)
        for at, index in enumerate(batch):
            _, alone = answer(loaded, questions, data, [index], 1)
            apart_by.append(apart(logits[0, at], alone[0, 0]))
            gaps.append(gap(alone[0, 0]))
    return {
        "logits_apart_at_most": max(apart_by),
        "smallest_gap": min(gaps),
        "median_gap": sorted(gaps)[len(gaps) // 2],
    }


def main() -> None:
    """Parse the command line, measure both ways and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--flash", action="store_true", help="PyTorch's fused attention instead of eager")
    given = parser.parse_args()

    import torch

    from phi3v.data.folder import Pictures
    from phi3v.demo.tiny import build_tiny
    from phi3v.evaluation.generate import Predictor
    from phi3v.evaluation.questions import plan_batches, prompt_lengths, read_questions
    from phi3v.evaluation.run import evaluate
    from phi3v.settings import EvaluateSettings

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = build_tiny(root / "model", [" ".join(WORDS)] * 3, seed=0, **SIZES[given.size])
        data = write_pages(root / "data", given.examples)
        found: dict[int, list[str]] = {}
        rates: dict[int, float] = {}
        for batch in (1, given.batch):
            settings = EvaluateSettings(
                model_name_or_path=str(model), data_dir=str(data), output_dir=str(root / f"out{batch}"), metrics=["anls"],
                num_crops=4, batch_size_per_gpu=batch, max_new_tokens=given.max_new_tokens, tqdm=False,
                use_flash_attention=given.flash, bf16=given.dtype == "bf16", fp32=given.dtype == "fp32",
            )  # fmt: skip
            evaluate(settings)
            lines = (root / f"out{batch}/after/predictions.jsonl").read_text().splitlines()
            found[batch] = [json.loads(line)["prediction"] for line in lines]
            rates[batch] = json.loads((root / f"out{batch}/after/timing.json").read_text())["examples_per_second"]
        different = [i for i, pair in enumerate(zip(found[1], found[given.batch], strict=True)) if pair[0] != pair[1]]
        questions, pictures = read_questions(data, "val"), Pictures(data)
        loaded = Predictor.load(model, settings, torch.device("cpu"), given.max_new_tokens, 4)
        lengths = prompt_lengths(pictures, questions, loaded.processor.image_processor, 4)
        batches = plan_batches(lengths, given.batch)
        reasons = [
            explain(loaded, questions, pictures, next(b for b in batches if i in b), i, given.max_new_tokens)
            for i in different[:8]
        ]
        print(
            json.dumps(
                {
                    **vars(given),
                    "parameters": sum(p.numel() for p in loaded.model.parameters()),
                    "threads": torch.get_num_threads(),
                    "examples_per_second": {"one_by_one": rates[1], "batched": rates[given.batch]},
                    "ratio": round(rates[given.batch] / rates[1], 2),
                    "first_token": first_step(loaded, questions, pictures, batches),
                    "different_answers": len(different),
                    "parted": reasons,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
