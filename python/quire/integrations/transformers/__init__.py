# SPDX-License-Identifier: Apache-2.0
"""quire under Hugging Face transformers: `enable(model)`, then use the model as before.

::

    from quire.integrations import transformers as quire_transformers

    quire_transformers.enable(model)
    model.generate(**inputs)                                  # quire's attention
    model.generate(**inputs, past_key_values=quire_transformers.QuireCache(model))  # and pages
    model.generate_batch(prompts, generation_config=config)   # continuous batching, no gathering

Works for decoders whose attention goes through transformers' attention interface, with
grouped-query heads, sliding windows (Mistral), soft-capped logits (Gemma-2) and sinks (GPT-OSS),
on the CPU, without gradients. Under continuous batching a KVCacheManager has the blocks and the
prefixes, where no layer has a window: prompts share what they begin with to the token.
"""

from .attention import disable, enable
from .cache import QuireCache

__all__ = ["QuireCache", "disable", "enable"]
