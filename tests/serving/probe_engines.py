"""Runs real vLLM with several data-parallel engines and prints what each serves, as JSON.

``LLM`` starts one engine, so this goes through `AsyncLLM`, as ``vllm serve -dp`` does. Usage as
``probe.py``: one setting.
"""

import asyncio
import json
import os
import sys

from probe import COMMON, PROMPTS, SAMPLING, served_weights, told


async def run(setting):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engines = setting["data_parallel_size"]
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**COMMON, **setting))

    async def ask(prompt, engine):
        sampling = SamplingParams(**SAMPLING)
        stream = llm.generate(
            {"prompt_token_ids": prompt}, sampling, f"{engine} {prompt}", data_parallel_rank=engine
        )
        async for output in stream:
            last = output
        return last

    try:
        # `collective_rpc` answers with what the first engine says.
        weights = await llm.engine_core.call_utility_all_async(
            "collective_rpc", served_weights, None, (), None
        )
        return [
            {"weights": own, **told([await ask(prompt, engine) for prompt in PROMPTS])}
            for engine, own in zip(range(engines), weights, strict=True)
        ]
    finally:
        llm.shutdown()


if __name__ == "__main__":
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    print("\nRESULT " + json.dumps(asyncio.run(run(json.loads(sys.argv[1])))))
