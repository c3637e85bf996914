"""Every field of the config: default, check, meaning, and what it needs.

`FIELDS` is the reference. To add a field, add its entry there and read it where
it acts. `train/schema.py` checks fields against each other, the data and the
devices.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from margin_jax import (
  data,
  linearized,
  losses,
  models,
  optimizers,
  selection,
)
from margin_jax.checks import (
  Check,
  did_you_mean,
  flag,
  integer,
  known,
  nearest,
  number,
  number_or,
  one_of,
  optional,
  parse_integer,
  several,
  string,
)
from margin_jax.data import augment, kinds

# A config by dotted names: {'data.name': 'digits', ...}.
Flat = dict[str, Any]

# Plain training on batches of b: no pool, nothing scored.
UNIFORM = 'uniform'

# The papers' B / b.
POOL_FACTOR = 10

# No fields, but saved with them: digests of what two fields name.
DIGESTS = {'data.name': 'data.digest', 'data.labels': 'data.labels_digest'}


class ConfigError(ValueError):
  """A field of the config is unknown, missing or has a bad value."""


@dataclasses.dataclass(frozen=True)
class Need:
  """What a field needs to have an effect.

  Attributes:
    words: what that is, to follow 'it needs'.
    met: flat config -> whether it is so.
    field: the one to change where it is not.
  """

  words: str
  met: Callable[[Flat], bool]
  field: str


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of the config.

  Attributes:
    default: its value in `default()`.
    check: what its value may be, whatever the other fields are.
    meaning: what it does.
    needs: without all of these it has no effect: the trainer warns.
    resumable: whether the run that continues a checkpoint may change it, or
      flat config -> whether it may. It then changes neither a batch nor an
      update, but for what rounding does: sums over other devices, or compiled
      in another loop, end in other bits.
  """

  default: Any
  check: Check
  meaning: str
  needs: Sequence[Need] = ()
  resumable: bool | Callable[[Flat], bool] = False


def _equal(field: str, *values: Any) -> Need:
  return Need(
    f'{field}={" or ".join(map(repr, values))}',
    lambda config: config[field] in values,
    field,
  )


def _above(least: int, field: str) -> Need:
  return Need(
    f'{field} above {least}', lambda config: config[field] > least, field
  )


def _dataset(words: str, met: Callable[[str], bool]) -> Need:
  """What the name of the dataset decides."""
  return Need(words, lambda config: met(config['data.name']), 'data.name')


def _augmentation(name: str) -> Need:
  field = 'data.augmentations'
  return Need(
    f'{name!r} in {field}', lambda config: name in config[field], field
  )


def _model(words: str, option: str) -> Need:
  return Need(
    words,
    lambda config: option in models.find(config['model.name']).options,
    'model.name',
  )


def _any_batch_norm(config: Flat) -> bool:
  proxy = config['selection.proxy'] if scores_pools(config) else None
  names = config['model.name'], proxy
  return any(name and models.find(name).batch_norm for name in names)


def scores_pools(config: Flat) -> bool:
  """Returns whether a forward pass scores pools of examples."""
  return config['selection.rule'] != UNIFORM and not config['selection.memory']


def remembers_scores(config: Flat) -> bool:
  """Returns whether the scores of training batches are remembered."""
  return config['selection.rule'] != UNIFORM and config['selection.memory']


def samples_pools(config: Flat) -> bool:
  """Returns whether batches are selected from pools, however these score."""
  if config['selection.rule'] == UNIFORM:
    return False
  return scores_pools(config) or config['selection.sampler'] == 'pool'


SCORING = Need(
  f'a selection.rule other than {UNIFORM!r}',
  lambda config: config['selection.rule'] != UNIFORM,
  'selection.rule',
)
FRESH = (
  SCORING,
  Need(
    'pools that are scored',
    lambda config: not config['selection.memory'],
    'selection.memory',
  ),
)
POOL = (
  SCORING,
  Need(
    "selection.sampler='pool' with selection.memory",
    lambda config: samples_pools(config),
    'selection.sampler',
  ),
)
MEMORY = (
  SCORING,
  Need(
    'selection.memory',
    lambda config: config['selection.memory'],
    'selection.memory',
  ),
)
PRUNE = _equal('selection.sampler', 'prune')
TRIMMING = Need(
  'trimming.first or trimming.last below 1',
  lambda config: min(config['trimming.first'], config['trimming.last']) < 1,
  'trimming.last',
)
MMR = Need(
  'mmr.alpha or mmr.alpha_end above 0',
  lambda config: bool(config['mmr.alpha'] or config['mmr.alpha_end']),
  'mmr.alpha',
)
LARGE_MARGIN = _above(0, 'large_margin.weight')
ATTACK = _equal('attack.name', 'fgsm', 'ifgsm', 'pgd')
IN_STEPS = _equal('attack.name', 'ifgsm', 'pgd')
BATCH_NORM = Need('a model with BatchNorm', _any_batch_norm, 'model.name')
IMAGES = _dataset('uint8 images', kinds.is_images)
STREAMED = Need(
  'a dataset that is streamed',
  lambda config: kinds.is_streamed(
    config['data.name'], config['data.streamed']
  ),
  'data.streamed',
)
ANY_SIZE = _dataset('images without a common size', kinds.may_be_resized)
SENTENCES = _dataset('sentences', kinds.is_sentences)


def _steps_may_change(config: Flat) -> bool:
  """Unless something depends on how far a step is from the last."""
  trims = config['trimming.first'] != config['trimming.last']
  alpha = config['mmr.alpha_end'] is not None
  decays = config['optimizer.decay'] != 'steps'
  return not (trims or alpha or decays or remembers_scores(config))


def _devices_may_change(config: Flat) -> bool:
  """Unless what is trained depends on how the examples are divided."""
  return not (
    config['model.batch_norm'] == 'device'
    or config['selection.scope'] == 'device'
    or config['trimming.backward'] == 'kept'
  )


def _parts_may_change(config: Flat) -> bool:
  """Unless BatchNorm, or what is selected, depends on how they are divided."""
  by_parts = models.find(config['model.name']).batch_norm and (
    config['model.batch_norm_examples'] is None
  )
  return not by_parts and config['trimming.backward'] == 'all'


# From 0, and so that nothing is infinite in float32.
AT_LEAST_0 = number(least=0, most=losses.LARGEST)
# Not 0 in float32 either.
POSITIVE = number(least=losses.SMALLEST, most=losses.LARGEST)
FRACTION = number(above=0, most=1)
# Losses by name; MMR and the large-margin loss have fields of their own.
RISKS = tuple(x for x in losses.LOSSES if x not in ('mmr', 'large_margin'))
DATASET = dataclasses.replace(
  string(), allowed=kinds.allowed, choices=kinds.names
)
RULE = known(lambda: (*selection.RULES, UNIFORM, *selection.REGISTERED))
MODEL = Check(
  lambda name: models.find(name) is not None,
  lambda: f'one of {models.names()}',
  str,
)  # there is no end of them
DTYPE = one_of(*models.DTYPES)

FIELDS: dict[str, Field] = {
  'seed': Field(
    0,
    integer(0, bits=32),
    'Decides everything random: the first parameters, the examples of every '
    'step, and so on.',
  ),
  'steps': Field(
    1000,
    integer(1),
    'Number of steps of the whole run.',
    resumable=_steps_may_change,
  ),
  'scale_schedule': Field(
    True,
    flag(),
    'If the command line, or a method or sweep of a comparison, sets fewer '
    '`steps` than the config file, the trainer scales optimizer.boundaries, '
    'optimizer.warmup, selection.start and selection.stop by the same factor, '
    'except those that are set there too. A longer run keeps them.',
    resumable=True,
  ),
  'batch_size': Field(
    64,
    integer(1),
    'Number of examples in a gradient step, b, over all devices.',
  ),
  'accumulate': Field(
    1,
    integer(1),
    'Differentiate the batch in this many equal parts, one after the other. '
    'The gradient is the same up to rounding, and takes less memory. '
    'BatchNorm normalizes each part by itself, unless '
    'model.batch_norm_examples says otherwise.',
    resumable=_parts_may_change,
  ),
  'pool_size': Field(
    POOL_FACTOR * 64,
    integer(1),
    'Number of examples to select a batch from, B, over all devices. By '
    'default it is ten times batch_size.',
    needs=POOL,
  ),
  'devices': Field(
    None,
    optional(integer(1)),
    'How many devices to use; None uses all that JAX sees.',
    resumable=_devices_may_change,
  ),
  'steps_per_call': Field(
    None,
    optional(integer(1)),
    'Steps compiled into one call. None chooses 1 on CPUs, where XLA is '
    'slow on gradients of convolutions in loops, and up to 100 on '
    'accelerators.',
    resumable=True,
  ),
  'on_nonfinite': Field(
    'stop',
    one_of('stop', 'skip'),
    'What to do if a loss, a gradient, an update or a BatchNorm statistic '
    "is NaN or infinite: 'stop' the run, or 'skip' the step. A NaN score "
    "stops the run too; with 'skip' it ranks last.",
    resumable=True,
  ),
  'log_every': Field(
    100,
    integer(1),
    'Steps between two rows of train.csv.',
    resumable=True,
  ),
  'log_rows': Field(
    None,
    optional(integer(1)),
    'Makes the tables and TensorBoard files of a long run small: after this '
    'many rows of train.csv, and each time the number of steps doubles from '
    'there, log_every doubles. A row is always the mean since the row before. '
    'Evaluations and checkpoints end a row too. None never doubles log_every.',
    resumable=True,
  ),
  'eval_every': Field(
    1000,
    integer(1),
    'Steps between two evaluations.',
    resumable=True,
  ),
  'checkpoint_every': Field(
    1000,
    integer(1),
    'Steps between two checkpoints.',
    resumable=True,
  ),
  'keep_every': Field(
    None,
    optional(integer(1)),
    'Never delete checkpoints at multiples of this step. The last two and '
    'the best are always kept.',
    needs=[
      Need(
        'as many steps',
        lambda config: (config['keep_every'] or 0) <= config['steps'],
        'steps',
      )
    ],
    resumable=True,
  ),
  'eval_batch_size': Field(
    1000,
    integer(1),
    'Number of examples to evaluate at once, over all devices.',
    resumable=True,
  ),
  # The data.
  'data.name': Field(
    'digits',
    DATASET,
    'The dataset. folder:PATH is a folder of images with a folder for each '
    'class; csv:PATH is a CSV file of sentences, or a folder with train.csv '
    'and test.csv.',
  ),
  'data.data_dir': Field(
    None,
    optional(string()),
    "Folder of the datasets that TFDS has prepared; None is TFDS's own "
    'folder. If it is set, a relative PATH in folder:PATH or csv:PATH starts '
    'there.',
    needs=[_dataset('a dataset that is read from a folder', kinds.is_read)],
    resumable=True,
  ),
  'data.validation_examples': Field(
    0,
    integer(0),
    'How many training examples to hold out for validation: the last, in the '
    'original order if the records tell it (CIFAR, GLUE), otherwise in the '
    'stored one. Of a folder or a CSV file, random ones by a fixed seed, of '
    'every class its fraction.',
  ),
  'data.fraction': Field(
    1.0,
    FRACTION,
    'Fraction of the other training examples to use; `seed` decides which.',
  ),
  'data.labels': Field(
    None,
    optional(string()),
    'A .npy file with your own labels for all N training examples, (N,) '
    'integers. `data.validation_examples` and `data.fraction` divide the '
    'examples afterwards. A resumed run may read the same labels from another '
    'file.',
    resumable=True,  # its digest is compared
  ),
  'data.label_noise': Field(
    0.0,
    number(least=0, most=1),
    'Fraction of the used examples whose labels are replaced by wrong ones; '
    '`seed` decides which.',
  ),
  'data.augmentations': Field(
    (),
    several(one_of(*augment.AUGMENTATIONS), order='different'),
    'Augmentations of training images, in the order given.',
  ),
  'data.crop_padding': Field(
    4,
    integer(0),
    'Pixels of padding on every side before a crop.',
    needs=[_augmentation('crop')],
  ),
  'data.cutout_size': Field(
    16,
    integer(1),
    'Side of the square that cutout covers.',
    needs=[_augmentation('cutout')],
  ),
  'data.normalization': Field(
    'dataset',
    one_of(*data.NORMALIZATIONS),
    "Which mean and standard deviation normalize images: the training split's "
    "('dataset') or ImageNet's ('imagenet'). The dataset ImageNet always uses "
    "its own. 'unit' leaves images in [0, 1]; then distances at the input are "
    'in units of pixels, as attack.epsilons are.',
    needs=[IMAGES],
  ),
  'data.image_size': Field(
    224,
    integer(1),
    'Images of different sizes are cut to squares of this side: those of '
    'ImageNet, of a folder, and of some other TFDS datasets.',
    needs=[ANY_SIZE],
  ),
  'data.streamed': Field(
    False,
    flag(),
    'Read images of different sizes while training, in worker processes, if '
    'they do not fit into the memory of a device. ImageNet is always read '
    'like this.',
    needs=[ANY_SIZE],
  ),
  'data.undecodable': Field(
    'stop',
    one_of('stop', 'skip'),
    "If an image cannot be decoded, end the run ('stop'), or leave it out and "
    "count it ('skip').",
    needs=[STREAMED],
    resumable=True,
  ),
  'data.workers': Field(
    8,
    integer(0),
    'Number of processes that decode images; 0 decodes in the training '
    'process.',
    needs=[STREAMED],
    resumable=True,
  ),
  'data.max_length': Field(
    128,
    integer(5),  # [CLS] and, of a pair, a token and [SEP] of each
    'Largest number of tokens in an example. Longer examples of GLUE and of a '
    'CSV file are cut.',
    needs=[SENTENCES],
  ),
  'data.buckets': Field(
    (32, 64),
    several(integer(3), order='increasing'),
    'Shorter lengths to pad examples to, all below data.max_length. '
    'Examples of one length form a bucket; a step samples from one bucket.',
    needs=[SENTENCES],
  ),
  'data.vocabulary': Field(
    None,
    optional(string()),
    'A vocab.txt for GLUE or a CSV file; None uses the vocabulary of '
    'model.pretrained.',
    needs=[_dataset('GLUE or a CSV file', kinds.needs_vocabulary)],
  ),
  # The model.
  'model.name': Field('cnn', MODEL, 'The model.'),
  'model.variant': Field(
    'he',
    one_of(*models.VARIANTS),
    "Layout of the CIFAR ResNets: He's, or that of the MMS authors' code. "
    "'mms_select' is the authors' layout, with the bias folded into the last "
    "layer's weights, and so into the norm and weight decay, as in "
    'mms-select.',
    needs=[_model('a model with variants', 'variant')],
  ),
  'model.head': Field(
    'linear',
    one_of(*models.HEADS),
    "What follows VGG's convolutions: the last layer alone ('linear'), or "
    "two hidden layers of 4096 before it ('released', as in the MMR "
    "authors' code).",
    needs=[_model('a model with heads', 'head')],
  ),
  'model.kernel_init': Field(
    'default',
    one_of(*models.KERNEL_INITS),
    "How kernels start: as the model defines it, or with Glorot's uniform "
    "distribution, TensorFlow's default.",
  ),
  'model.dtype': Field(
    'float32',
    DTYPE,
    'Dtype of the computation; parameters and the head stay float32.',
    needs=[_model('a model with a field dtype', 'dtype')],
  ),
  'model.batch_norm': Field(
    'global',
    one_of('global', 'device'),
    'Which examples BatchNorm normalizes with: the examples of all devices '
    "('global', which does not depend on the number of devices), or each "
    "device's own ('device').",
    needs=[
      BATCH_NORM,
      Need(
        'model.batch_norm_examples=None',
        lambda config: config['model.batch_norm_examples'] is None,
        'model.batch_norm_examples',
      ),
    ],
  ),
  'model.batch_norm_examples': Field(
    None,
    optional(integer(2)),
    'BatchNorm normalizes groups of this many examples of a training batch, '
    'and averages the running statistics. The effect is that of '
    "model.batch_norm='device' with this many examples on each device, but "
    'on any number of devices. None makes no groups.',
    needs=[BATCH_NORM],
  ),
  'model.dropout': Field(
    0.0,
    number(least=0, below=1),
    'Fraction of the activations to drop: inside a block of wide ResNets; '
    "in VGG's hidden layers (released: 0.5), or its features; in BERT's "
    'embeddings, sublayers, attention and features (published: 0.1).',
    needs=[_model('a model with dropout', 'dropout')],
  ),
  'model.stem': Field(
    'imagenet',
    one_of(*models.STEMS),
    "First layers of ImageNet ResNets and DenseNets; 'small' is for images "
    'of 32x32.',
    needs=[_model('a model with stems', 'stem')],
  ),
  'model.width': Field(
    1.0,
    POSITIVE,
    "Multiplies MobileNet's numbers of channels.",
    needs=[_model('a model with a width multiplier', 'width')],
  ),
  'model.pretrained': Field(
    None,
    optional(string()),
    'Weights to start from: a .safetensors or PyTorch file; for BERT, a '
    "folder in Hugging Face's layout or a name on its hub. None starts from "
    'random weights.',
  ),
  # The optimizer.
  'optimizer.name': Field(
    'sgd',
    known(lambda: (*optimizers.NAMES, *optimizers.REGISTERED)),
    "The optimizer; 'adamw' is Adam with decoupled weight decay.",
  ),
  'optimizer.learning_rates': Field(
    (0.1,),
    several(number(least=0, most=1e38), least=1),
    'Learning rates; learning_rates[i] applies from step boundaries[i-1] on.',
  ),
  'optimizer.boundaries': Field(
    (),
    several(integer(1), order='increasing'),
    'Steps at which the learning rate changes.',
  ),
  'optimizer.warmup': Field(
    0,
    integer(0),
    'Steps over which the learning rate rises from 0.',
  ),
  'optimizer.decay': Field(
    'steps',
    one_of(*optimizers.DECAYS),
    "How the learning rate changes: only at the boundaries ('steps'), or from "
    "the end of the warm-up down to 0 at the last step, on a line ('linear') "
    "or on half a cosine wave ('cosine').",
  ),
  'optimizer.momentum': Field(
    0.9,
    number(least=0, below=1),
    'Decay of the sum of past gradients.',
    needs=[_equal('optimizer.name', 'sgd', 'rmsprop')],
  ),
  'optimizer.nesterov': Field(
    False,
    flag(),
    "Nesterov's form of momentum.",
    needs=[_equal('optimizer.name', 'sgd'), _above(0, 'optimizer.momentum')],
  ),
  'optimizer.weight_decay': Field(
    0.0,
    AT_LEAST_0,
    "Coefficient of the L2 penalty. With 'adamw', a step shrinks the "
    'parameters by the fraction weight_decay times the learning rate.',
  ),
  'optimizer.weight_decay_mask': Field(
    'kernels',
    one_of(*optimizers.WEIGHT_DECAY_MASKS),
    "What decays: 'kernels' (with embeddings, but without biases and scales "
    "of normalization), only kernels of 'convolutions', or 'all' "
    'parameters.',
    needs=[_above(0, 'optimizer.weight_decay')],
  ),
  'optimizer.epsilon': Field(
    None,
    optional(POSITIVE),
    'Added to the denominator, with rmsprop under its root; None uses '
    "optax's default.",
    needs=[_equal('optimizer.name', 'adam', 'adamw', 'rmsprop')],
  ),
  'optimizer.clip_norm': Field(
    None,
    optional(POSITIVE),
    'Largest L2 norm of the gradient; None does not clip it.',
  ),
  # The average of the weights.
  'ema.decay': Field(
    0.0,
    number(least=0, below=1),
    'Decay of the exponential moving average of the parameters and the '
    'BatchNorm statistics, which covers about the last 1 / (1 - decay) steps. '
    'The average is evaluated, loaded and exported in place of the '
    'parameters. It has no bias towards the first steps. 0 keeps no average.',
  ),
  # Selection of the batch from a pool.
  'selection.rule': Field(
    UNIFORM,
    RULE,
    'The rule that scores examples, to select the batch from a pool or to '
    "choose an epoch's examples (selection.memory). 'uniform' scores "
    'nothing.',
  ),
  'selection.scope': Field(
    'global',
    one_of('global', 'device'),
    "Rank examples over all devices ('global'), or within each ('device').",
    needs=FRESH,
  ),
  'selection.batch_stats': Field(
    'selected',
    one_of('selected', 'pool'),
    "Whether BatchNorm's running statistics follow the selected batches or "
    "the pool. With 'pool', scoring runs in training mode.",
    needs=FRESH,
  ),
  'selection.reuse': Field(
    1,
    integer(1),
    'Number of steps that one scored pool feeds, the lowest scores first.',
    needs=FRESH,
  ),
  'selection.every': Field(
    1,
    integer(1),
    'Score at every n-th step; the other steps are plain.',
    needs=FRESH,
  ),
  'selection.start': Field(
    0,
    integer(0),
    'First step that scores; earlier steps are plain.',
    needs=FRESH,
  ),
  'selection.stop': Field(
    None,
    optional(integer(1)),
    'First step that no longer scores; None scores to the end.',
    needs=FRESH,
  ),
  'selection.score_dtype': Field(
    None,
    optional(DTYPE),
    "Dtype of the scoring forward pass; None uses the model's.",
    needs=FRESH,
  ),
  'selection.score_resolution': Field(
    None,
    optional(integer(4)),
    'Side to resize images to for scoring; None keeps their own.',
    needs=FRESH,
  ),
  'selection.proxy': Field(
    None,
    optional(MODEL),
    'A small model that trains along with the model and scores in its place; '
    'None scores with the model itself.',
    needs=FRESH,
  ),
  'selection.proxy_every': Field(
    1,
    integer(1),
    'Train the proxy at every n-th step before selection.stop.',
    needs=[
      *FRESH,
      Need(
        'a selection.proxy',
        lambda config: config['selection.proxy'] is not None,
        'selection.proxy',
      ),
    ],
  ),
  # The score memory, in place of scoring pools.
  'selection.memory': Field(
    False,
    flag(),
    'Score no pool. The rule scores each batch by its own training forward '
    "pass, and the sampler chooses the next epoch's examples by these "
    'scores.',
    needs=[SCORING],
  ),
  'selection.sampler': Field(
    'prune',
    one_of('pool', 'prune', 'weighted'),
    'How to choose the examples of an epoch: the lowest scores of small '
    "pools ('pool'), all except a random part of the easy examples "
    "('prune'), or batches sampled by rank, low scores most often "
    "('weighted').",
    needs=MEMORY,
  ),
  'selection.warmup': Field(
    1,
    integer(0),
    'Number of first epochs that have all examples, shuffled.',
    needs=MEMORY,
  ),
  'selection.tail': Field(
    0.125,
    number(least=0, most=1),
    'Last fraction of the steps, in which epochs have all examples, shuffled.',
    needs=MEMORY,
  ),
  'selection.decay': Field(
    0.0,
    number(least=0, below=1),
    "Decay of the exponential average of an example's scores; 0 keeps the "
    'last score.',
    needs=MEMORY,
  ),
  'selection.explore': Field(
    0.0,
    number(least=0, most=1),
    'Fraction of the batch to fill with those examples of the pool that '
    'were trained on longest ago.',
    needs=[*MEMORY, _equal('selection.sampler', 'pool')],
  ),
  'selection.threshold': Field(
    'share',
    one_of('share', 'mean'),
    'Which examples are easy: the fraction selection.share with the largest '
    "scores ('share'), or those above the mean ('mean'; with the rule loss, "
    'this is InfoBatch).',
    needs=[*MEMORY, PRUNE],
  ),
  'selection.share': Field(
    0.5,
    number_or(number(least=0, most=1), 'auto'),
    "Fraction of examples that are easy. 'auto' follows what is learned: an "
    'epoch leaves out (1 - sqrt(e))^2 of all examples, but at most '
    'drop * (1 - e), where e is the fraction misclassified when last seen.',
    needs=[*MEMORY, PRUNE, _equal('selection.threshold', 'share')],
  ),
  'selection.drop': Field(
    0.5,
    number(least=0, below=1),
    'Fraction of the easy examples that an epoch leaves out, at random.',
    needs=[*MEMORY, PRUNE],
  ),
  'selection.pressure': Field(
    100.0,
    number(least=1, most=losses.LARGEST),
    'How many times more often the lowest score is sampled than the largest, '
    'in the beginning. It falls geometrically to 1.',
    needs=[*MEMORY, _equal('selection.sampler', 'weighted')],
  ),
  'selection.unbiased': Field(
    False,
    flag(),
    'Weigh examples to make the expected sum of the losses over an epoch equal '
    "to that over all examples. With 'prune', the easy examples that stay have "
    'the weight 1 / (1 - drop), so an epoch of half the steps has steps of '
    'twice the gradient (with several buckets of sentences, the weights of a '
    "bucket are scaled to the mean 1); with 'weighted', the weight of an "
    'example is its clipped inverse probability.',
    needs=[*MEMORY, _equal('selection.sampler', 'prune', 'weighted')],
  ),
  'selection.ramp': Field(
    0.0,
    AT_LEAST_0,
    'How much the hard fraction of the batch grows per epoch of pools. The '
    'rest is random, and classes are balanced. 0 is plain hard-negative '
    'mining; the authors use 0.1.',
    needs=[*FRESH, _equal('selection.rule', 'loss')],
  ),
  'selection.beta': Field(
    1.0,
    AT_LEAST_0,
    'Power of the loss percentile.',
    needs=[*FRESH, _equal('selection.rule', 'selective_backprop')],
  ),
  'selection.log_counts': Field(
    False,
    flag(),
    'Count how often each training example is in a batch.',
  ),
  # Mini-batch trimming.
  'trimming.first': Field(
    1.0,
    FRACTION,
    'Fraction of the batch that counts in the first epoch: the examples with '
    'the largest losses. The fraction changes linearly in the epoch. 1 in the '
    'first and the last epoch turns trimming off.',
  ),
  'trimming.last': Field(
    1.0,
    FRACTION,
    'The fraction that counts in the last epoch; the paper has 1.0 in the '
    'first and 0.2 in the last.',
  ),
  'trimming.backward': Field(
    'all',
    one_of('all', 'kept'),
    "Whether the backward pass runs on 'all' of the batch, or only on the "
    "examples that count ('kept', for models without BatchNorm).",
    needs=[TRIMMING],
  ),
  # The loss.
  'loss.risk': Field(
    'cross_entropy',
    known(lambda: (*RISKS, *losses.REGISTERED)),
    "The loss of each example: 'cross_entropy', 'hinge' (multi-class), or a "
    'registered one.',
  ),
  'loss.names': Field(
    (),
    several(known(lambda: (*RISKS, *losses.REGISTERED)), order='different'),
    'Losses to add to the risk. MMR and the large-margin loss have their '
    'own fields.',
  ),
  'loss.weights': Field(
    (),
    several(AT_LEAST_0),
    'Weights of loss.names, one for each.',
  ),
  # Multi-margin regularization.
  'mmr.alpha': Field(0.0, AT_LEAST_0, 'Weight of MMR in the loss.'),
  'mmr.alpha_end': Field(
    None,
    optional(AT_LEAST_0),
    'Weight of MMR at the last step; it changes linearly in the step. None '
    'keeps mmr.alpha.',
  ),
  'mmr.schedule': Field(
    'linear',
    one_of('linear', 'released'),
    "How the weight changes: 'linear' in the step, as in the paper, or as "
    "in the authors' 'released' code: constant in each epoch, linear in the "
    "epoch's number, 0 in the first (they have alpha=1e-4, alpha_end=1e-2).",
    needs=[
      Need(
        'mmr.alpha_end',
        lambda config: config['mmr.alpha_end'] is not None,
        'mmr.alpha_end',
      ),
      MMR,
    ],
  ),
  'mmr.reduction': Field(
    'mean_of_squares',
    one_of(*losses.REDUCTIONS),
    "The paper's mean over the batch, or the square of the mean, as in the "
    "authors' later code.",
    needs=[MMR],
  ),
  'mmr.stop_feature_gradient': Field(
    False,
    flag(),
    'Stop the gradient through the norm of the features.',
    needs=[MMR],
  ),
  # The large-margin loss.
  'large_margin.weight': Field(
    0.0,
    AT_LEAST_0,
    'Weight of the large-margin loss in the total loss; 0 turns it off.',
  ),
  'large_margin.cross_entropy': Field(
    1.0,
    AT_LEAST_0,
    'Weight of the risk beside the large-margin loss; 0 trains on the '
    'large-margin loss alone.',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.layers': Field(
    ('input',),
    several(string(), order='different', least=1),
    "Layers at which to widen margins: 'input', 'features', or paths of "
    'submodules. Each margin is in the units of its layer. At the input these '
    "units come from data.normalization; with 'unit' they are the units of "
    'the attack.',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.layer_weights': Field(
    (),
    several(POSITIVE),
    'One weight for each layer, which multiplies the distances there. So the '
    'gamma of a layer is large_margin.gamma divided by its weight. () means 1 '
    'for each.',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.norm': Field(
    'l2',
    number_or(number(least=1), *linearized.NORMS),
    'Norm of the distances: a name, or a number p for the p-norm.',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.top_k': Field(
    1,
    integer(1),
    'Number of wrong classes that count.',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.worst_case': Field(
    False,
    flag(),
    'Count only the nearest of the large_margin.top_k wrong classes.',
    needs=[LARGE_MARGIN, _above(1, 'large_margin.top_k')],
  ),
  'large_margin.difference': Field(
    'softmax',
    one_of(*losses.DIFFERENCES),
    "Which class differences give the distances: those of the 'softmax' or "
    "of the 'logits'.",
    needs=[LARGE_MARGIN],
  ),
  'large_margin.gamma': Field(
    1e4,
    POSITIVE,
    'Distances are clipped to [gamma * (1 - alpha), gamma].',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.alpha': Field(
    4.0,
    POSITIVE,
    'See large_margin.gamma.',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.epsilon': Field(
    1e-6,
    POSITIVE,
    'Added to the gradient norm in the denominator of a distance.',
    needs=[LARGE_MARGIN],
  ),
  'large_margin.normalize_by_size': Field(
    False,
    flag(),
    "Divide gradient norms by the number of the layer's activations.",
    needs=[LARGE_MARGIN],
  ),
  'large_margin.second_order': Field(
    False,
    flag(),
    'Use the exact gradient, through the norm of the gradient.',
    needs=[LARGE_MARGIN],
  ),
  # Evaluation under an attack.
  'attack.name': Field(
    None,
    optional(one_of('fgsm', 'ifgsm', 'pgd')),
    'At the end, also evaluate the test split under this l_inf attack.',
    resumable=True,
  ),
  'attack.epsilons': Field(
    (),
    several(number(above=0, most=1), order='different'),
    'Largest changes of a pixel under the attack; images are in [0, 1].',
    needs=[ATTACK],
    resumable=True,
  ),
  'attack.steps': Field(
    10,
    integer(1),
    'Number of steps of IFGSM and PGD.',
    needs=[IN_STEPS],
    resumable=True,
  ),
  'attack.step_size': Field(
    None,
    optional(number(above=0, most=1)),
    'Largest change of a pixel in one step. None is epsilon over the number '
    'of steps with IFGSM, and 2.5 times that with PGD.',
    needs=[IN_STEPS],
    resumable=True,
  ),
  'attack.source': Field(
    None,
    optional(string()),
    'Workdir of another run on the same data. Its network, as last saved, '
    'makes the adversarial examples: a black-box attack. None uses the '
    'attacked network itself.',
    needs=[ATTACK],
    resumable=True,
  ),
}


def default() -> ml_collections.ConfigDict:
  """Returns every field with its default; config files change some of them.

  `pool_size` follows `batch_size` until it is set itself.
  """
  nested: dict[str, Any] = {}
  for name, field in FIELDS.items():
    *sections, leaf = name.split('.')
    values = nested
    for section in sections:
      values = values.setdefault(section, {})
    values[leaf] = field.default
    if field.default is None or field.check.type is object:
      values[leaf] = config_dict.FieldReference(field.default, field.check.type)
  config = ml_collections.ConfigDict(nested)
  config.pool_size = POOL_FACTOR * config.get_ref('batch_size')
  return config


# Ways to select, by name: an argument of config files, a method of `compare`.
PRESETS = {
  'memory': 'soft pruning by remembered margins, without a pool',
  'proxy': 'MMS of a pool that a small model scores',
  'fresh': 'MMS of a pool that each step scores',
}


def preset(name: str, dataset: str) -> Flat:
  """Returns the fields of a way to select.

  Args:
    name: one of `PRESETS`.
    dataset: a `data.name`, for which there is a proxy.

  Raises:
    ConfigError: there is no preset of that name.
  """
  if name not in PRESETS:
    raise ConfigError(f'preset {name!r} must be one of {tuple(PRESETS)}')
  small = 'bert2_128_2' if kinds.is_sentences(dataset) else 'resnet8'
  memory = {
    'selection.rule': 'signed_margin',
    'selection.memory': True,
    'selection.sampler': 'prune',
    'selection.threshold': 'share',
    'selection.share': 'auto',
    'selection.drop': 0.9,
    'selection.proxy': None,
  }
  proxy = {
    'selection.rule': 'mms',
    'selection.memory': False,
    'selection.proxy': small,
    'selection.proxy_every': 4,
  }
  fresh = {
    'selection.rule': 'mms',
    'selection.memory': False,
    'selection.proxy': None,
  }
  return {'memory': memory, 'proxy': proxy, 'fresh': fresh}[name]


# MMR on CIFAR as in the paper, and as in the code that its authors released.
MMR_ON_CIFAR: dict[str, Flat] = {
  'paper': {'mmr.alpha': 1e-5, 'mmr.alpha_end': 1e-3},
  'released': {
    'mmr.alpha': 1e-4,
    'mmr.alpha_end': 1e-2,
    'mmr.schedule': 'released',
    'mmr.reduction': 'square_of_mean',
  },
}


def require(holds: bool, name: str, value: Any, allowed: str) -> None:
  """Raises a `ConfigError` about a field unless `holds`."""
  if not holds:
    raise ConfigError(f'{name}={value!r} is not allowed: it must be {allowed}')


def without_effect(config: Flat) -> dict[str, str]:
  """Returns the fields that have no effect whatever their value is, and why.

  Args:
    config: every field, each with a value that its check allows.

  Returns:
    Reasons, such as "it needs selection.rule='loss', but selection.rule is
    'mms'", by the name of the field.
  """
  reasons = {}
  for name, field in FIELDS.items():
    for need in field.needs:
      if not need.met(config):
        reasons[name] = (
          f'it needs {need.words}, but {need.field} is {config[need.field]!r}'
        )
        break
  return reasons


@dataclasses.dataclass(frozen=True)
class Argument:
  """An argument of a config file.

  Attributes:
    default: its value where it is not given, whose type it gets; or a tuple of
      strings: the values allowed, the first the default.
    needs: another argument, and those of its values with which this one has an
      effect; None if it always has.
  """

  default: Any
  needs: tuple[str, tuple[str, ...]] | None = None

  @property
  def allowed(self) -> str:
    """What it may be, in words."""
    if isinstance(self.default, tuple):
      meanings = [f'{x}: {PRESETS[x]}' for x in self.default if x in PRESETS]
      return '; '.join([f'one of {self.default}', *meanings])
    return f'of type {type(self.default).__name__}'


# The arguments of the config files that are being asked which they have.
_ASKED: list[dict[str, Argument]] = []


@contextlib.contextmanager
def asked_for_arguments() -> Iterator[dict[str, Argument]]:
  """Yields a dictionary that the first call of `parse_arguments` fills."""
  _ASKED.append({})
  try:
    yield _ASKED[-1]
  finally:
    _ASKED.pop()


def parse_arguments(
  text: str | None, **fields: Any
) -> ml_collections.ConfigDict:
  """Parses the argument of a config file: `config.py:mms,regime=standard`.

  Args:
    text: what stands behind the colon: comma-separated `field=value`; the
      first may be a bare value, for the first field.
    **fields: for each field its default, whose type the value gets, or a
      tuple of strings: the values allowed, the first the default; or an
      `Argument`.

  Returns:
    The value of every field.

  Raises:
    ConfigError: unknown field, value not allowed, or field given twice; or it
      needs another value of another field.
  """
  arguments = {
    name: field if isinstance(field, Argument) else Argument(field)
    for name, field in fields.items()
  }
  if _ASKED and not _ASKED[-1]:
    _ASKED[-1].update(arguments)
  given: dict[str, Any] = {}
  for position, part in enumerate(filter(None, (text or '').split(','))):
    name, equals, value = part.partition('=')
    if not equals:
      if position:
        raise ConfigError(
          f'config argument {part!r} must be field=value'
          + _meant(part, arguments)
        )
      name, value = next(iter(arguments)), part
    if name not in arguments:
      raise ConfigError(
        f'config argument {name!r} is unknown; there are {tuple(arguments)}'
        + did_you_mean(nearest(name, arguments))
      )
    if name in given:
      raise ConfigError(f'config argument {name!r} is given twice')
    meant = _meant(value, arguments)
    given[name] = _parse_argument(name, value, arguments[name], meant)
  values = {
    name: given.get(name, _first(argument.default))
    for name, argument in arguments.items()
  }
  for name in given:
    if arguments[name].needs is not None:
      other, needed = arguments[name].needs
      if values[other] not in needed:
        needed = ' or '.join(f'{other}={value}' for value in needed)
        raise ConfigError(
          f'config argument {name}={given[name]} needs {needed}, but {other} '
          f'is {values[other]!r}'
        )
  return ml_collections.ConfigDict(values)


def _first(default: Any) -> Any:
  return default[0] if isinstance(default, tuple) else default


def _meant(value: str, arguments: Mapping[str, Argument]) -> str:
  """Says which argument a value may be for; a slip of the pen counts."""
  choices = {
    choice: f'{name}={choice}'
    for name, argument in reversed(arguments.items())
    if isinstance(argument.default, tuple)
    for choice in argument.default
  }
  near = [value] if value in choices else nearest(value, choices)
  return did_you_mean([choices[x] for x in near])


def _parse_argument(
  name: str, text: str, argument: Argument, meant: str
) -> Any:
  kind = type(argument.default)
  try:
    if kind is tuple:
      return argument.default[argument.default.index(text)]
    if kind is bool:
      return {'true': True, 'false': False}[text.lower()]
    return parse_integer(text) if kind is int else kind(text)
  except (KeyError, ValueError):
    raise ConfigError(
      f'config argument {name}={text!r} must be {argument.allowed}{meant}'
    ) from None


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """Returns {'data.name': 'digits', ...}, with tuples for sequences."""
  flat = {}
  for name, value in dict(config).items():
    if isinstance(value, ml_collections.ConfigDict | dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = tuple(value) if isinstance(value, list) else value
  return flat


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the flattened config as JSON will give it back."""
  return json.loads(json.dumps(flatten(config)))


def from_json(saved: dict[str, Any]) -> ml_collections.ConfigDict:
  """Returns the config that `as_json` read; fields it lacks are defaults.

  Raises:
    ConfigError: it has a field that does not exist, or a value of another type.
  """
  config = default()
  known = flatten(config)
  for name, value in saved.items():
    if name not in known:
      raise ConfigError(
        f'{name}={value!r} is unknown; the fields are {tuple(known)}'
      )
    value = tuple(value) if isinstance(value, list) else value
    try:
      config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError) as error:
      raise ConfigError(f'{name}={value!r} is not allowed: {error}') from error
  return config


def _resumable(name: str, config: Flat) -> bool:
  """Returns whether a continued run may change the field."""
  if name not in FIELDS:
    return False
  resumable = FIELDS[name].resumable
  return resumable(config) if callable(resumable) else resumable


def binds_devices(config: Flat) -> bool:
  """Returns whether what is trained depends on the number of devices."""
  return not _resumable('devices', as_json(default()) | config)


def differences(saved: Flat, config: Flat) -> list[str]:
  """Lines 'field: saved -> now' for fields that a continued run must keep."""
  saved = as_json(default()) | saved  # fields that came after the checkpoint
  return [
    f'{name}: {saved.get(name)!r} -> {config.get(name)!r}'
    for name in sorted({*saved, *config})
    if saved.get(name) != config.get(name) and not _resumable(name, config)
  ]
