"""Records what training computes, bit for bit, to compare two checkouts.

    python tests/golden.py /tmp/before.json --root=/tmp/old_checkout
    python tests/golden.py /tmp/after.json
    python tests/golden.py --compare /tmp/before.json /tmp/after.json

Each case is 20 steps of the command line, on 1 and on 4 virtual CPU devices:
digests of parameters, running statistics, optimizer state and selection counts,
FLOPs, columns of the tables, results, and the lines that the command prints.
Cases that read real data run where MARGIN_JAX_TEST_DATA is set.

    python tests/golden.py --stable /tmp/before.json

writes what does not depend on the machine from there into tests/golden.json,
for tests/test_golden.py: once with each version of jax, whose FLOPs may differ.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np

SMALL = {
  'steps': 20,
  'batch_size': 8,
  'pool_size': 32,
  'log_every': 5,
  'eval_every': 10,
  'checkpoint_every': 10,
  'eval_batch_size': 100,
  'optimizer.learning_rates': (0.05,),
  'optimizer.weight_decay': 1e-4,
}
DIGITS = {
  'data.validation_examples': 180,
  'data.augmentations': ('crop',),
  'data.crop_padding': 1,
}
MMR = {'mmr.alpha': 1e-4}
COUNTED = {'selection.log_counts': True}
CASES = {
  'mms': {**DIGITS, **MMR, **COUNTED, 'selection.rule': 'mms'},
  'loss_ramp_reuse': {
    **DIGITS, **COUNTED, 'selection.rule': 'loss', 'selection.ramp': 0.1,
    'selection.reuse': 2,
  },
  'entropy_window': {
    **DIGITS, **COUNTED, 'selection.rule': 'entropy', 'selection.every': 3,
    'selection.start': 2, 'selection.stop': 15,
  },
  'selective_backprop': {
    **DIGITS, **COUNTED, 'selection.rule': 'selective_backprop',
  },
  'random_calls_of_four': {
    **DIGITS, **COUNTED, 'selection.rule': 'random', 'selection.every': 2,
    'steps': 16, 'log_every': 4, 'eval_every': 8, 'checkpoint_every': 8,
    'steps_per_call': 4,
  },
  'resnet_pool_statistics': {
    **DIGITS, **MMR, 'model.name': 'resnet8', 'selection.rule': 'mms',
    'selection.batch_stats': 'pool', 'model.batch_norm': 'device',
    'selection.scope': 'device', 'selection.reuse': 2,
  },
  'proxy': {
    **DIGITS, 'model.name': 'resnet8', 'selection.proxy': 'cnn',
    'selection.score_dtype': 'bfloat16', 'selection.rule': 'margin',
  },
  'trimming': {
    **DIGITS, 'trimming.first': 1.0, 'trimming.last': 0.2,
    'data.fraction': 0.02, 'eval_batch_size': 50,
  },
  'trimming_kept': {
    **DIGITS, 'trimming.first': 1.0, 'trimming.last': 0.2,
    'trimming.backward': 'kept', 'data.fraction': 0.05,
  },
  'mmr_square_adam': {
    **DIGITS, 'optimizer.name': 'adam', 'optimizer.learning_rates': (1e-3,),
    'optimizer.momentum': 0.9, 'optimizer.warmup': 5, 'mmr.alpha': 1e-4,
    'mmr.alpha_end': 1e-2, 'mmr.reduction': 'square_of_mean',
    'optimizer.decay': 'linear', 'data.label_noise': 0.1,
  },
  'large_margin': {
    **DIGITS, 'model.name': 'mnist_cnn', 'large_margin.weight': 1e-4,
    'large_margin.layers': ('input', 'norm1', 'features'),
    'large_margin.norm': 'l_inf', 'large_margin.top_k': 2,
    'large_margin.second_order': True, 'optimizer.clip_norm': 5.0,
    'attack.name': 'pgd', 'attack.epsilons': (0.1,), 'attack.steps': 3,
  },
  'wrn_dropout_skip': {
    **DIGITS, 'model.name': 'wrn10_1', 'model.dropout': 0.3,
    'on_nonfinite': 'skip', 'optimizer.learning_rates': (1e30,),
  },
  'sentences': {
    'data.name': 'entailment', 'model.name': 'bert2_32_2',
    'model.dropout': 0.1, 'optimizer.name': 'adam',
    'optimizer.learning_rates': (1e-3,), 'selection.rule': 'mms',
    'selection.reuse': 2, 'data.max_length': 48, 'data.buckets': (24, 32),
    'data.fraction': 0.1, **COUNTED, **MMR,
  },
  'streamed': {
    'data.name': 'imagenet2012', 'data.data_dir': '{data}/tfds_sample',
    'data.image_size': 64, 'data.workers': 0, 'model.name': 'mobilenet',
    'model.width': 0.25, 'selection.rule': 'loss', 'selection.reuse': 2,
    'selection.score_resolution': 32, 'data.augmentations': ('flip',),
    'eval_batch_size': 20, **COUNTED,
  },
  'cifar': {
    'data.name': 'cifar10', 'data.data_dir': '{data}/tfds',
    'data.fraction': 0.02, 'model.name': 'resnet8', 'selection.rule': 'mms',
    'data.validation_examples': 5000,
    'data.augmentations': ('crop', 'flip', 'cutout'), **COUNTED, **MMR,
  },
}  # fmt: skip
# The cases of tests/golden.json; of the last, every example's count is stable.
STABLE = ('mms', 'loss_ramp_reuse', 'random_calls_of_four')
STABLE_FILE = pathlib.Path(__file__).with_suffix('.json')
# Commands that end in one line.
MISTAKES = {
  'batch size': ['--config.batch_size=0'],
  'rule': ['--config.selection.rule=mmss'],
  'field': ['--config.batchsize=3'],
  'devices': ['--config.devices=100'],
  'pool': ['--config.pool_size=4'],
  'model': ['--config.model.name=resnet9'],
  'layers': [
    '--config.large_margin.weight=1.0',
    "--config.large_margin.layers=('nothing',)",
  ],
  'argument': ['surplus'],
}
# Fields by the name that they had before.
BEFORE = {
  'optimizer.weight_decay_mask': 'optimizer.decayed',
  'large_margin.normalize_by_size': 'large_margin.by_size',
  'data.buckets': 'data.widths',
}
CONFIG = """
from margin_jax import config as config_lib

FIELDS = {fields!r}
BEFORE = {before!r}


def get_config(argument=None):
  config = config_lib.default()
  known = config_lib.flatten(config)
  names = dict((x, x if x in known else BEFORE.get(x, x)) for x in FIELDS)
  with config.unlocked():
    config.update_from_flattened_dict(
      dict((names[x], value) for x, value in FIELDS.items())
    )
  return config
"""


def digest(tree) -> str:
  """Of names, shapes, dtypes and bytes."""
  import jax

  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    name = jax.tree_util.keystr(path)
    found.update(f'{name} {array.dtype} {array.shape}'.encode())
    found.update(np.ascontiguousarray(array).tobytes())
  return found.hexdigest()[:16]


def saved_state(workdir: pathlib.Path, step: int) -> dict[str, str]:
  """Digests of a checkpoint's parts, whatever program wrote it."""
  import orbax.checkpoint as ocp

  path = workdir / 'checkpoints' / str(step) / 'state'
  state = ocp.StandardCheckpointer().restore(path.absolute())
  names = ('params', 'batch_stats', 'opt_state', 'proxy', 'counts')
  return {name: digest(state.get(name)) for name in names}


def lines_of(text: str) -> list[str]:
  """Printed lines without what another run has otherwise."""
  text = re.sub(r'(eta )[\d:]+|[\d.]+( steps/s)', r'\1#\2', text)
  text = re.sub(r'[\d.]+ s\b', '# s', text)
  return text.replace('(1.0 steps', '').splitlines()


def run_case(
  name: str, devices: int, root: pathlib.Path, python: str
) -> dict[str, object] | None:
  """What a case leaves behind; None without its data."""
  fields = {**SMALL, **CASES[name]}
  data = os.environ.get('MARGIN_JAX_TEST_DATA')
  for field, value in fields.items():
    if isinstance(value, str) and '{data}' in value:
      if data is None:
        return None
      fields[field] = value.format(data=data)
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder, 'run')
    config = pathlib.Path(folder, 'config.py')
    config.write_text(CONFIG.format(fields=fields, before=BEFORE))
    done = command(root, python, devices, config, workdir)
    if done.returncode:
      return {'stderr': done.stderr.splitlines()[-3:]}
    found = left_behind(workdir, fields['steps'])
    return {**found, 'lines': lines_of(done.stdout)}


def left_behind(workdir: pathlib.Path, steps: int) -> dict[str, dict]:
  """The state, the columns of the tables and the result of a run."""
  result = json.loads((workdir / 'result.json').read_text())
  loose = ('seconds', 'data_wait', 'compile_seconds', 'config', 'versions')
  loose += ('classes',)  # which older versions do not write
  return {
    'state': saved_state(workdir, steps),
    'columns': {
      path.name: path.read_text().splitlines()[0]
      for path in sorted(workdir.glob('*.csv'))
    },
    'result': {k: v for k, v in result.items() if k not in loose},
  }


def command(
  root: pathlib.Path,
  python: str,
  devices: int,
  config: pathlib.Path,
  workdir: pathlib.Path,
  *flags: str,
) -> subprocess.CompletedProcess:
  """Runs the trainer's command line."""
  return subprocess.run(
    [python, '-m', 'margin_jax.train', f'--config={config}',
     f'--workdir={workdir}', *flags],
    cwd=root, capture_output=True, text=True, check=False,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'TF_CPP_MIN_LOG_LEVEL': '3',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    },
  )  # fmt: skip


def record(root: pathlib.Path, python: str, only: list[str]) -> dict:
  """All cases on 1 and 4 devices, and the lines that mistakes end in."""
  found = {}
  for name in only or CASES:
    for devices in (1, 4):
      found[f'{name} on {devices}'] = run_case(name, devices, root, python)
      print(name, devices, flush=True)
  if not only:
    config = root / 'configs' / 'digits.py'
    for name, flags in MISTAKES.items():
      with tempfile.TemporaryDirectory() as folder:
        done = command(root, python, 1, config, pathlib.Path(folder), *flags)
      found[f'mistake: {name}'] = {
        'lines': lines_of(done.stdout + done.stderr)[-2:]
      }
  return found


def stable(name: str, found: dict) -> dict[str, object]:
  """Of what a case leaves behind, what is alike on every machine."""
  result = found['result']
  kept = ('examples_scored', 'examples_trained', 'test', 'validation')
  kept = {key: result[key] for key in kept if key in result}
  for split in ('test', 'validation'):
    if split in kept:  # of a class, one example is a lot
      kept[split] = {**kept[split]}
      kept[split].pop('worst_class_accuracy', None)
  if name == STABLE[-1]:
    kept['counts'] = found['state']['counts']
  return {'columns': found['columns'], **kept}


def write_stable(recorded: dict) -> None:
  """Writes the stable cases; FLOPs beside those of other versions of jax."""
  import jax

  written = {}
  if STABLE_FILE.exists():
    written = json.loads(STABLE_FILE.read_text())
  for name in STABLE:
    runs = {devices: recorded[f'{name} on {devices}'] for devices in (1, 4)}
    flops = written.get(name, {}).get('flops', {})
    flops[jax.__version__] = {
      str(devices): found['result']['flops'] for devices, found in runs.items()
    }
    written[name] = {**stable(name, runs[1]), 'flops': flops}
  STABLE_FILE.write_text(json.dumps(written, indent=1) + '\n')


def compare(before: dict, after: dict, path: str = '') -> list[str]:
  """Lines about what differs."""
  if isinstance(before, dict) and isinstance(after, dict):
    names = dict.fromkeys([*before, *after])
    return [
      line
      for name in names
      for line in compare(
        before.get(name), after.get(name), f'{path} / {name}'.strip(' /')
      )
    ]
  return [] if before == after else [f'{path}:\n  {before}\n  {after}']


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('out', nargs='?')
  parser.add_argument('--root', type=pathlib.Path, default=pathlib.Path.cwd())
  parser.add_argument('--python', default=sys.executable)
  parser.add_argument('--case', action='append', default=[])
  parser.add_argument('--compare', nargs=2, type=pathlib.Path)
  parser.add_argument('--stable', type=pathlib.Path)
  args = parser.parse_args()
  if args.stable:
    write_stable(json.loads(args.stable.read_text()))
    return
  if args.compare:
    lines = compare(*(json.loads(path.read_text()) for path in args.compare))
    print('\n'.join(lines) or 'no difference')
    sys.exit(bool(lines))
  found = record(args.root, args.python, args.case)
  pathlib.Path(args.out).write_text(json.dumps(found, indent=1))


if __name__ == '__main__':
  main()
