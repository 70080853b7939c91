"""vLLM's answers to a job of tests/clients; runs in vLLM's own environment: python vllm_offline.py JOB.json RESULT.json"""

import json
import sys
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        job["checkpoint"], trust_remote_code=True, dtype="float32", max_model_len=job["max_model_len"], max_num_seqs=4,
        limit_mm_per_prompt={"image": 2}, enforce_eager=True, skip_mm_profiling=True,
        seed=0,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=0)
    requests = []
    for case in job["cases"]:
        request = {"prompt": case["prompt"]}
        if case["images"]:
            request["multi_modal_data"] = {"image": [Image.open(file).convert("RGB") for file in case["images"]]}
        requests.append(request)
    batches = [requests] if job.get("batched") else [[request] for request in requests]
    outputs = [output for batch in batches for output in llm.generate(batch, sampling)]
    found = {}
    for case, output in zip(job["cases"], outputs, strict=True):
        answer = output.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        found[case["name"]] = {
            "prompt_ids": list(output.prompt_token_ids), "ids": list(answer.token_ids), "logprobs": logprobs,
        }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
