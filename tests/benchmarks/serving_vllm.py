"""Runs in vLLM's own environment: one line of JSON in (lengths and prompts), one line out (seconds), until the end.

VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-1 python serving_vllm.py MODEL_DIR MAX_MODEL_LEN BATCH
"""

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # vLLM writes to stdout itself
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams, __version__

    model, max_model_len, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=max_model_len,
        max_num_seqs=batch,
        enable_prefix_caching=False,
    )
    print(json.dumps({"version": __version__}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = [
            SamplingParams(max_tokens=count, min_tokens=count, ignore_eos=True, temperature=0, detokenize=False)
            for count in asked["output_tokens"]
        ]
        prompts = [{"prompt_token_ids": own} for own in asked["prompts"]]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        wall_s = time.perf_counter() - started
        counts = [len(own.outputs[0].token_ids) for own in outputs]
        print(json.dumps({"wall_s": wall_s, "output_tokens": counts}), file=answers, flush=True)


if __name__ == "__main__":
    main()
