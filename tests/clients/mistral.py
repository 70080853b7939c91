"""mistral.rs' answers to a job of tests/clients: python mistral.py JOB.json RESULT.json"""

import base64
import json
import sys
from pathlib import Path

from mistralrs import ChatCompletionRequest, ModelDType, MultimodalArchitecture, Runner, Which


def picture(file: str) -> dict:
    encoded = base64.b64encode(Path(file).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    model = Which.MultimodalPlain(job["checkpoint"], arch=MultimodalArchitecture.Phi3V, dtype=ModelDType.F32)
    runner = Runner(model, no_paged_attn=True, prefix_cache_n=0)
    found = {}
    for case in job["cases"]:
        content = case["content"]
        if case["images"]:
            tags = "".join(f"<|image_{number}|>\n" for number, _ in enumerate(case["images"], 1))
            content = [*map(picture, case["images"]), {"type": "text", "text": tags + content}]
        request = ChatCompletionRequest(
            model="default", messages=[{"role": "user", "content": content}], temperature=0.0, logprobs=True,
            top_logprobs=1, max_tokens=job["new_tokens"], ignore_eos=True,
        )  # fmt: skip
        answered = runner.send_chat_completion_request(request)
        choice = answered.choices[0]
        found[case["name"]] = {
            "text": choice.message.content, "logprobs": [step.logprob for step in choice.logprobs.content],
            "prompt_tokens": answered.usage.prompt_tokens,
        }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
