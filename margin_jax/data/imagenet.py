"""ImageNet (ILSVRC 2012) as TFDS prepares it; its JPEGs stay encoded."""

from margin_jax.data import images, tfds_images
from margin_jax.data.dataset import DatasetError

NAMES = ('imagenet2012',)

# The labels of TFDS's 'test' are secret; everybody reports on 'validation'.
SPLITS = {'train': 'train', 'test': 'validation'}


def load(name: str, data_dir: str | None) -> images.Source:
  """Opens the records of the training and the test split.

  Args:
    name: one of `NAMES`.
    data_dir: the folder that TFDS prepares datasets in, or None for its own.

  Raises:
    DatasetError: the dataset is not there, broken, or in another format.
  """
  import tensorflow_datasets as tfds

  builder, command = tfds_images.open_builder(name, data_dir)
  try:
    records = {
      ours: builder.as_data_source(
        split=theirs, decoders={'image': tfds.decode.SkipDecoding()}
      )
      for ours, theirs in SPLITS.items()
    }
    for dataset in records.values():
      dataset[0]
  except Exception as error:  # array_record raises many kinds
    raise DatasetError(
      f'dataset {name!r} in {builder.data_path} is broken ({error}). Remove it '
      f'and prepare it again with: {command}'
    ) from error
  classes = builder.info.features['label'].num_classes
  return images.Source(
    records, classes, tfds_images.class_names(name, data_dir, classes)
  )
