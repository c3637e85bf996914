"""Sentences as arrays: token ids, and the sentence each token belongs to.

A whole batch of pairs is one array (B, L, 2). [..., 0] are ids; [..., 1] is 0
at padding, 1 in the first sentence, with its [CLS] and [SEP], 2 in the second.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array


def pack(ids: np.ndarray, segments: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Packs what BERT calls ids, segments and mask.

  Args:
    ids: (B, L), of the dtype that comes back.
    segments: (B, L), 0 or 1.
    mask: (B, L), 1 or True where there is a token.

  Returns:
    (B, L, 2).
  """
  sentence = (np.asarray(segments) + 1) * np.asarray(mask)
  return np.stack([ids, sentence.astype(ids.dtype)], axis=-1)


def unpack(inputs: Array) -> dict[str, Array]:
  """Unpacks what BERT takes.

  Args:
    inputs: (B, L, 2), integers.

  Returns:
    'ids', (B, L) int32; 'segments', (B, L) int32, 0 or 1, 0 at padding;
    'mask', (B, L) bool, True where there is a token.
  """
  sentence = inputs[..., 1].astype(jnp.int32)
  return {
    'ids': inputs[..., 0].astype(jnp.int32),
    'segments': jnp.maximum(sentence - 1, 0),
    'mask': sentence > 0,
  }


def lengths(inputs: np.ndarray) -> np.ndarray:
  """Returns how many tokens each row of (N, L, 2) has: (N,) int32."""
  return np.count_nonzero(inputs[..., 1], axis=-1).astype(np.int32)
