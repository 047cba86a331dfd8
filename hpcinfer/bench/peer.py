"""The same work by `generate` of transformers, on the same device and in the same run: what a user has without an engine.

Greedy, in padded batches in the order of length, as its documentation shows for batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from hpcinfer.errors import ConfigError
from hpcinfer.request import Request


def transformers_tokens_per_s(
    config: dict[str, Any], requests: Sequence[Request], *, dtype: torch.dtype, device: torch.device, batch_size: int
) -> dict[str, float]:
    """Output tokens per second of a random model of these dimensions.

    Args:
        config: contents of config.json.
        requests: each gets as many tokens as it asks for; in a batch all get as many as the longest, and the rest is dropped.
        batch_size: sequences of a batch.

    Raises:
        ConfigError: transformers is not installed, or does not know the family.
    """
    model, version = _random_model(config, dtype, device)
    ordered = sorted(requests, key=lambda request: len(request.prompt_token_ids))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    _generate(model, batches[0][:1], device, max_new_tokens=2)
    start_s = time.perf_counter()
    for batch in batches:
        _generate(model, batch, device, max(request.sampling.max_tokens for request in batch))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start_s
    tokens = sum(request.sampling.max_tokens for request in requests)
    return {"seconds": seconds, "output_tokens_per_s": tokens / seconds, "batch_size": batch_size, "version": version}


def _random_model(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    try:
        import transformers
    except ImportError as cause:
        raise ConfigError(
            "a comparison with transformers needs it", found=str(cause), fix="pip install transformers"
        ) from cause
    facts = dict(config)
    class_name = facts.pop("architectures")[0]
    facts.pop("quantization_config", None)
    model_class = getattr(transformers, class_name)
    made = model_class.config_class(**facts)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = model_class(made)
    finally:
        torch.set_default_dtype(before)
    return model.eval(), transformers.__version__


@torch.inference_mode()
def _generate(model: Any, batch: Sequence[Request], device: torch.device, max_new_tokens: int) -> None:
    longest = max(len(request.prompt_token_ids) for request in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):  # prompts end together, as generate wants it
        prompt = torch.from_numpy(request.prompt_token_ids).long()
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0,
    )
