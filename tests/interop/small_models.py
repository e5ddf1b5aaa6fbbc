# SPDX-License-Identifier: Apache-2.0
"""What the configurations of small random models share."""

SMALL = dict(
    vocab_size=199,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.2,  # ten times the usual: else attention hardly matters to the logits
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
