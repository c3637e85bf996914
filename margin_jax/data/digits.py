"""scikit-learn's digits: 1,797 images of 8x8 that need no download."""

import numpy as np

from margin_jax.data.dataset import Split

TEST_EXAMPLES = 360


def load() -> tuple[Split, Split, int]:
  """Returns the training split (1,437), the test split (360), and 10 classes.

  The images come by writer; they are shuffled once, by a fixed seed, so that
  the splits are alike. Grey levels 0..16 are spread over 0..255.
  """
  from sklearn import datasets

  digits = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(digits.target))
  images = np.round(digits.images[order, :, :, None] * (255 / 16))
  inputs = images.astype(np.uint8)
  label = digits.target[order].astype(np.int32)
  train = {'inputs': inputs[TEST_EXAMPLES:], 'label': label[TEST_EXAMPLES:]}
  test = {'inputs': inputs[:TEST_EXAMPLES], 'label': label[:TEST_EXAMPLES]}
  return train, test, 10
