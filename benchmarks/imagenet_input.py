"""How many ImageNet JPEGs a second are read, decoded and cropped.

    python -m benchmarks.imagenet_input --data_dir=DIR

DIR holds `imagenet2012` as TFDS prepares it. Random-resized-crops to 224, as
training samples them: by the decoder alone, and through the pipeline with 0 or
more worker processes; all in turns, medians over the rounds with quartiles.
Starting the workers is counted apart. Writes benchmarks/imagenet_input.md.
"""

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Iterator

import numpy as np

from margin_jax import data
from margin_jax.data import imagenet, streaming
from margin_jax.train import devices as devices_lib
from margin_jax.train.reporting import versions

SIZE = 224
BATCH = 64


def decoded(data_dir: str, images: int) -> Iterator[float]:
  """The decoder alone, in this process: when each batch was done."""
  records = imagenet.load('imagenet2012', data_dir).records
  encoded = [x['image'] for x in records['train'].__getitems__(range(64))]
  rng = np.random.default_rng(0)
  yield time.perf_counter()
  for _ in range(images // BATCH):
    for image in encoded[:BATCH]:
      streaming.decode(image, SIZE, rng)
    yield time.perf_counter()


def piped(data_dir: str, images: int, workers: int) -> Iterator[float]:
  """The whole pipeline: when each batch, but for the first, was there."""
  dataset = data.load(
    'imagenet2012', data_dir=data_dir, image_size=SIZE, workers=workers
  )
  # Two more to start with: what the workers read ahead is not counted.
  steps = images // BATCH + 3
  batches = dataset.training([BATCH] * steps, 0, 0, devices_lib.Shard(0, 1))
  for step, _ in enumerate(batches):
    if step >= 2:
      yield time.perf_counter()


def measure(times: Iterator[float], images: int) -> tuple[float, float]:
  """Seconds until the first time, and images a second from there on."""
  started = time.perf_counter()
  images = images // BATCH * BATCH  # whole batches
  found = list(times)
  return found[0] - started, images / (found[-1] - found[0])


def table(results: dict[str, list[tuple[float, float]]]) -> list[str]:
  """Markdown, a row for each variant."""
  rows = [
    '| | images/s | quartiles | seconds to start |',
    '|---|---|---|---|',
  ]
  for name, found in results.items():
    starts, speeds = zip(*found, strict=True)
    low, middle, high = statistics.quantiles(speeds, n=4, method='inclusive')
    rows.append(
      f'| {name} | {middle:.0f} | {low:.0f} to {high:.0f} '
      f'| {statistics.median(starts):.1f} |'
    )
  return rows


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data_dir', required=True)
  parser.add_argument('--images', type=int, default=640)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--workers', type=int, nargs='*', default=[0, 1, 2])
  args = parser.parse_args()
  if args.images < BATCH:
    parser.error(f'--images must be at least {BATCH}')
  variants = {
    'decoding alone, one process': lambda: decoded(args.data_dir, args.images)
  }
  for workers in args.workers:
    variants[f'pipeline, workers={workers}'] = lambda workers=workers: piped(
      args.data_dir, args.images, workers
    )
  results = {name: [] for name in variants}
  for _ in range(args.rounds):
    for name, run in variants.items():
      results[name].append(measure(run(), args.images))
      print(f'{name}: {results[name][-1][1]:.0f} images/s', flush=True)
  text = '\n'.join(
    [
      '# JPEGs per second',
      '',
      f'`python -m benchmarks.imagenet_input --images={args.images} '
      f'--rounds={args.rounds}`: random-resized-crops to {SIZE}, '
      f'{args.images} images per round after a warm-up, medians of '
      f'{args.rounds} rounds in turns.',
      '',
      *table(results),
      '',
      f'{os.cpu_count()} cores, Pillow, Python {versions()["python"]}.',
      '',
    ]
  )
  path = pathlib.Path(__file__).with_suffix('.md')
  path.write_text(text)
  print(text)


if __name__ == '__main__':
  main()
