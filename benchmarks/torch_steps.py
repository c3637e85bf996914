"""The steps of benchmarks/step_time.py in PyTorch, as a process of its own.

    python -m benchmarks.torch_steps resnet20 --batch=64 --pool=640

Written for the comparison, from the papers and not from our JAX code: uint8
images in memory, crop and flip on the device, channels-last, MMS from the two
largest logits, `topk`, SGD with momentum; AMP where bfloat16 is asked for.
Reads lines from standard input, 'plain 5', 'mms 5', 'forward 5' (how many
steps), and answers each with the seconds of a step.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
  """Two 3x3 convolutions, after BatchNorm and ReLU (WRN) or before (ResNet).

  Where the shape changes, WRN has a 1x1 convolution, ResNet nothing to learn.
  """

  def __init__(self, inside: int, outside: int, stride: int, wide: bool):
    """Creates the layers."""
    super().__init__()
    self.wide = wide
    self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
    self.norm1 = nn.BatchNorm2d(inside if wide else outside)
    self.norm2 = nn.BatchNorm2d(outside)
    self.stride, self.more = stride, outside - inside
    if wide and self.more:
      self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) to (N, C', H', W')."""
    if self.wide:
      y = F.relu(self.norm1(x))
      skipped = self.shortcut(y) if self.more else x
      y = F.relu(self.norm2(self.conv1(y)))
      return skipped + self.conv2(y)
    y = F.relu(self.norm1(self.conv1(x)))
    if self.more:  # fewer pixels, more channels
      x = x[:, :, :: self.stride, :: self.stride]
      x = F.pad(x, (0, 0, 0, 0, 0, self.more))
    return F.relu(self.norm2(self.conv2(y)) + x)


class ImageNetwork(nn.Module):
  """ResNet-6n+2 or WRN-6n+4-k for 32x32 images; the head is `head`."""

  def __init__(self, blocks: int, width: int, wide: bool):
    """Creates the layers."""
    super().__init__()
    self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    self.norm = nn.BatchNorm2d(64 * width if wide else 16)
    self.wide = wide
    layers, inside = [], 16
    for stage in range(3):
      for i in range(blocks):
        outside = 16 * width * 2**stage
        stride = 2 if stage and not i else 1
        layers.append(Block(inside, outside, stride, wide))
        inside = outside
    self.blocks = nn.Sequential(*layers)
    self.head = nn.Linear(inside, 10)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Images to logits."""
    x = self.stem(x)
    x = x if self.wide else F.relu(self.norm(x))
    x = self.blocks(x)
    x = F.relu(self.norm(x)) if self.wide else x
    return self.head(x.mean((2, 3)))


class Sentences(nn.Module):
  """BERT with two classes: `nn.TransformerEncoderLayer` is its layer."""

  def __init__(self, layers: int, width: int, heads: int):
    """Creates the layers."""
    super().__init__()
    self.word = nn.Embedding(30522, width)
    self.place = nn.Embedding(512, width)
    self.norm = nn.LayerNorm(width)
    self.dropout = nn.Dropout(0.1)
    layer = nn.TransformerEncoderLayer(
      width, heads, 4 * width, 0.1, 'gelu', batch_first=True
    )
    self.layers = nn.TransformerEncoder(
      layer, layers, enable_nested_tensor=False
    )
    self.pooler = nn.Linear(width, width)
    self.head = nn.Linear(width, 2)

  def forward(self, ids: torch.Tensor) -> torch.Tensor:
    """(N, T) tokens to logits."""
    x = self.word(ids) + self.place.weight[: ids.shape[1]]
    x = self.layers(self.dropout(self.norm(x)))
    return self.head(self.dropout(torch.tanh(self.pooler(x[:, 0]))))


def make_model(name: str) -> nn.Module:
  """resnet20, wrn16_4, bert4_256_4, bert_base, ..."""
  if name.startswith('bert'):
    sizes = '12_768_12' if name == 'bert_base' else name.removeprefix('bert')
    return Sentences(*map(int, sizes.split('_')))
  if name.startswith('resnet'):
    return ImageNetwork((int(name[6:]) - 2) // 6, 1, wide=False)
  depth, width = name.removeprefix('wrn').split('_')
  return ImageNetwork((int(depth) - 4) // 6, int(width), wide=True)


class Steps:
  """A model, its optimizer and data on a device, and the three steps."""

  def __init__(self, args: argparse.Namespace):
    """Creates all of it."""
    self.gpu = args.device == 'cuda'
    if self.gpu and not torch.cuda.is_available():
      raise SystemExit('error: this PyTorch sees no GPU')
    self.device = args.device
    self.half = args.dtype == 'bfloat16'
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    self.batch, self.pool = args.batch, args.pool
    self.sentences = args.model.startswith('bert')
    model = make_model(args.model).to(self.device)
    if not self.sentences:
      model = model.to(memory_format=torch.channels_last)
    self.model = model
    # Two sizes of batch, each compiled for itself.
    modes = {'default': None, 'graphs': 'reduce-overhead'}
    self.call = model
    if args.compile is not None:
      self.call = torch.compile(model, dynamic=False, mode=modes[args.compile])
    parameters = model.parameters()
    self.optimizer = (
      torch.optim.Adam(parameters, 2e-5, fused=True)
      if self.sentences
      else torch.optim.SGD(
        parameters, 0.1, momentum=0.9, weight_decay=1e-4, fused=True
      )
    )
    count = 10 * self.pool
    classes = 2 if self.sentences else 10
    shape = (count, 128) if self.sentences else (count, 3, 32, 32)
    top = 30522 if self.sentences else 256
    dtype = torch.int64 if self.sentences else torch.uint8
    self.inputs = torch.randint(0, top, shape, dtype=dtype).to(self.device)
    self.label = torch.randint(0, classes, (count,)).to(self.device)

  def sample(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random batch, augmented and normalized."""
    index = torch.randperm(len(self.label), device=self.device)[:size]
    x, label = self.inputs[index], self.label[index]
    if self.sentences:
      return x, label
    x = F.pad(x, (4, 4, 4, 4))
    places = torch.randint(0, 9, (2, size), device=self.device)
    rows = torch.arange(32, device=self.device)
    flip = torch.rand(size, device=self.device) < 0.5
    columns = torch.where(flip[:, None], rows.flip(0), rows)
    x = x.permute(0, 2, 3, 1)[
      torch.arange(size, device=self.device)[:, None, None],
      (places[0][:, None] + rows)[:, :, None],
      (places[1][:, None] + columns)[:, None, :],
    ]
    x = x.float().sub_(120.0).div_(64.0)  # NHWC in memory: channels-last
    return x.permute(0, 3, 1, 2), label

  def autocast(self) -> torch.autocast:
    """Bfloat16 where that was asked for."""
    return torch.autocast(self.device, torch.bfloat16, enabled=self.half)

  @torch.no_grad()
  def score(self, x: torch.Tensor) -> torch.Tensor:
    """MMS of a pool, in evaluation mode."""
    self.model.eval()
    with self.autocast():
      logits = self.call(x).float()
    top, places = logits.topk(2, dim=1)
    kernel = self.model.head.weight
    difference = kernel[places[:, 0]] - kernel[places[:, 1]]
    return (top[:, 0] - top[:, 1]) / difference.norm(dim=1).clamp(min=1e-12)

  def train(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """One gradient step."""
    self.model.train()
    self.optimizer.zero_grad(set_to_none=True)
    with self.autocast():
      loss = F.cross_entropy(self.call(x).float(), label)
    loss.backward()
    self.optimizer.step()
    return loss.detach()

  def step(self, kind: str) -> torch.Tensor:
    """'plain', 'mms', or 'forward' on the pool alone."""
    if kind == 'plain':
      return self.train(*self.sample(self.batch))
    x, label = self.sample(self.pool)
    scores = self.score(x)
    if kind == 'forward':
      return scores
    chosen = scores.topk(self.batch, largest=False).indices
    x = x[chosen]
    if not self.sentences:
      x = x.contiguous(memory_format=torch.channels_last)
    return self.train(x, label[chosen])

  def time(self, kind: str, steps: int) -> float:
    """Seconds a step."""
    started = time.perf_counter()
    for _ in range(steps):
      last = self.step(kind)
    last.cpu()
    if self.gpu:
      torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def main() -> None:
  """Answers lines until there are no more."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('model')
  parser.add_argument('--batch', type=int, default=64)
  parser.add_argument('--pool', type=int, default=640)
  parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--compile', choices=('default', 'graphs'))
  args = parser.parse_args()
  steps = Steps(args)
  print(f'PyTorch {torch.__version__} on {args.device}', flush=True)
  for line in sys.stdin:
    kind, count = line.split()
    print(steps.time(kind, int(count)), flush=True)


if __name__ == '__main__':
  main()
