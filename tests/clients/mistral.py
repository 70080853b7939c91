"""mistral.rs' answers to the texts of a job of tests/clients: python mistral.py JOB.json RESULT.json"""

import json
import sys
from pathlib import Path

from mistralrs import ChatCompletionRequest, ModelDType, MultimodalArchitecture, Runner, Which


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    model = Which.MultimodalPlain(job["checkpoint"], arch=MultimodalArchitecture.Phi3V, dtype=ModelDType.F32)
    runner = Runner(model, no_paged_attn=True, prefix_cache_n=0)
    found = {}
    for case in job["cases"]:
        request = ChatCompletionRequest(
            model="default", messages=[{"role": "user", "content": case["content"]}], temperature=0.0, logprobs=True,
            top_logprobs=1, max_tokens=job["new_tokens"], ignore_eos=True,
        )  # fmt: skip
        choice = runner.send_chat_completion_request(request).choices[0]
        found[case["name"]] = {
            "text": choice.message.content, "logprobs": [step.logprob for step in choice.logprobs.content],
        }  # fmt: skip
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
