"""CIFAR-10 in two small files, to copy to another machine.

    python -m benchmarks.packed_cifar10 pack FOLDER --data_dir=DIR
    python -m benchmarks.packed_cifar10 unpack FOLDER --data_dir=NEW

`pack` writes FOLDER/part_0.npz and part_1.npz, without loss (WebP, 50 images in
one). `unpack` turns both into a folder that margin_jax reads with neither TFDS
nor array_record: the decoded splits, where the first run would have put them,
beside empty files in place of the records.
"""

import argparse
import io
import json
import pathlib

import numpy as np
from PIL import Image

from margin_jax.data import cache, tfds_images

NAME = 'cifar10'
GROUP = 50  # images in one: smaller than one each, or 500
PARTS = 2

Split = dict[str, np.ndarray]


def compress(images: np.ndarray) -> bytes:
  """(N, H, W, 3) uint8, below each other, as WebP without loss."""
  strip = Image.fromarray(images.reshape(-1, *images.shape[2:]))
  file = io.BytesIO()
  strip.save(file, 'WEBP', lossless=True, method=4, exact=True)
  return file.getvalue()


def expand(stored: bytes, shape: tuple[int, ...]) -> np.ndarray:
  """What `compress` was given."""
  return np.asarray(Image.open(io.BytesIO(stored))).reshape(-1, *shape)


def pack(folder: pathlib.Path, data_dir: str) -> list[int]:
  """Writes the parts, and returns their sizes in bytes."""
  splits, _ = tfds_images.load(NAME, data_dir, side=32)
  train, test = splits['train'], splits['test']
  inputs = np.concatenate([train['inputs'], test['inputs']])
  label = np.concatenate([train['label'], test['label']])
  (info,) = (
    pathlib.Path(data_dir).expanduser().glob(f'{NAME}/*/dataset_info.json')
  )
  about = {
    'version': info.parent.name,
    'info': info.read_text(),
    'records': sorted(
      x.name
      for x in info.parent.glob(
        f'{NAME}-*.{json.loads(info.read_text())["fileFormat"]}-*'
      )
    ),
    'train': len(train['label']),
  }
  folder.mkdir(parents=True, exist_ok=True)
  sizes = []
  for part, rows in enumerate(np.array_split(np.arange(len(label)), PARTS)):
    groups = [
      compress(inputs[rows[start : start + GROUP]])
      for start in range(0, len(rows), GROUP)
    ]
    path = folder / f'part_{part}.npz'
    np.savez(
      path,
      groups=np.frombuffer(b''.join(groups), np.uint8),
      ends=np.cumsum([len(group) for group in groups]),
      shape=np.array(inputs.shape[1:]),
      label=label[rows],
      about=np.array(json.dumps(about)),
    )
    sizes.append(path.stat().st_size)
  return sizes


def unpack(folder: pathlib.Path, data_dir: str) -> None:
  """Makes the folder that `pack` read, as far as margin_jax reads it."""
  inputs, label = [], []
  for part in range(PARTS):
    with np.load(folder / f'part_{part}.npz') as stored:
      starts = [0, *stored['ends'][:-1]]
      groups, shape = stored['groups'], tuple(stored['shape'])
      for start, end in zip(starts, stored['ends'], strict=True):
        inputs.append(expand(groups[start:end].tobytes(), shape))
      label.append(stored['label'])
      about = json.loads(str(stored['about']))
  inputs, label = np.concatenate(inputs), np.concatenate(label)
  version = pathlib.Path(data_dir).expanduser() / NAME / about['version']
  version.mkdir(parents=True, exist_ok=True)
  (version / 'dataset_info.json').write_text(about['info'])
  for name in about['records']:
    (version / name).touch()
  for split, rows in (
    ('train', slice(about['train'])),
    ('test', slice(about['train'], None)),
  ):
    decoded = {'inputs': inputs[rows], 'label': label[rows]}
    cache.cached(
      f'{NAME}-{about["version"]}-{split}',
      [version / x for x in about['records'] if f'-{split}.' in x],
      len(decoded['label']),
      lambda decoded=decoded: decoded,
    )
  if tfds_images._stored(NAME, data_dir) is None:
    raise SystemExit(
      f'error: the decoded splits could not be written to {version}'
    )


def main() -> None:
  """Packs or unpacks."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('what', choices=('pack', 'unpack'))
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--data_dir', required=True)
  args = parser.parse_args()
  if args.what == 'unpack':
    unpack(args.folder, args.data_dir)
    return
  sizes = pack(args.folder, args.data_dir)
  print('bytes:', *(f'{size:,}' for size in sizes))


if __name__ == '__main__':
  main()
