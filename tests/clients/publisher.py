"""The publisher's own code on a job of tests/clients, under transformers 4.43: python publisher.py JOB.json RESULT.json"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor


@torch.no_grad()
def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    model, loaded = AutoModelForCausalLM.from_pretrained(
        job["checkpoint"], trust_remote_code=True, torch_dtype=torch.float32, _attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    model.eval()
    processor = AutoProcessor.from_pretrained(job["checkpoint"], trust_remote_code=True)
    found = {}
    for case in job["cases"]:
        images = [Image.open(file).convert("RGB") for file in case["images"]] or None
        inputs = processor(case["prompt"], images, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=job["new_tokens"], min_new_tokens=job["new_tokens"], do_sample=False,
            output_logits=True, return_dict_in_generate=True, eos_token_id=processor.tokenizer.eos_token_id,
        )  # fmt: skip
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = [
            float(step[0].float().log_softmax(-1)[token]) for step, token in zip(output.logits, ids, strict=True)
        ]
        found[case["name"]] = {"ids": ids, "logprobs": logprobs, "prompt_tokens": inputs["input_ids"].shape[1]}
    found["loading"] = {name: loaded[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
