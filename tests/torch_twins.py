"""Networks in PyTorch, written from the papers with torchvision's names."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, size, stride=1, bias=False):
  return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions."""

  grows = 1

  def __init__(self, inputs, width, stride):
    super().__init__()
    self.conv1 = conv(inputs, width, 3, stride)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3)
    self.bn2 = nn.BatchNorm2d(width)
    self.downsample = shortcut(inputs, width, stride)

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return F.relu(self.downsample(x) + self.bn2(self.conv2(y)))


class Bottleneck(nn.Module):
  """1x1, 3x3 with the stride, 1x1."""

  grows = 4

  def __init__(self, inputs, width, stride):
    super().__init__()
    self.conv1 = conv(inputs, width, 1)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = conv(width, width, 3, stride)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = conv(width, 4 * width, 1)
    self.bn3 = nn.BatchNorm2d(4 * width)
    self.downsample = shortcut(inputs, 4 * width, stride)

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    return F.relu(self.downsample(x) + self.bn3(self.conv3(y)))


def shortcut(inputs, outputs, stride):
  if inputs == outputs and stride == 1:
    return nn.Identity()
  return nn.Sequential(
    conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
  )


class ResNet(nn.Module):
  """Of the ImageNet family; `small` is the form for 32x32 images."""

  def __init__(self, block, counts, classes, small):
    super().__init__()
    self.small = small
    self.conv1 = conv(3, 64, 3) if small else conv(3, 64, 7, 2)
    self.bn1 = nn.BatchNorm2d(64)
    channels = 64
    for stage, count in enumerate(counts):
      width = 64 * 2**stage
      blocks = []
      for index in range(count):
        stride = 2 if stage > 0 and index == 0 else 1
        blocks.append(block(channels, width, stride))
        channels = width * block.grows
      setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))
    self.fc = nn.Linear(channels, classes)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    if not self.small:
      x = F.max_pool2d(x, 3, 2, 1)
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
      x = stage(x)
    return self.fc(x.mean((2, 3)))


class DenseLayer(nn.Module):
  """BatchNorm, ReLU, 1x1; BatchNorm, ReLU, 3x3; beside what it read."""

  def __init__(self, inputs):
    super().__init__()
    self.norm1 = nn.BatchNorm2d(inputs)
    self.conv1 = conv(inputs, 128, 1)
    self.norm2 = nn.BatchNorm2d(128)
    self.conv2 = conv(128, 32, 3)

  def forward(self, x):
    y = self.conv1(F.relu(self.norm1(x)))
    return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class Transition(nn.Module):
  """Half the channels, half the side."""

  def __init__(self, inputs):
    super().__init__()
    self.norm = nn.BatchNorm2d(inputs)
    self.conv = conv(inputs, inputs // 2, 1)

  def forward(self, x):
    return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
  """DenseNet-BC with growth 32."""

  def __init__(self, counts, classes, small):
    super().__init__()
    self.small = small
    features = nn.Sequential()
    features.add_module('conv0', conv(3, 64, 3) if small else conv(3, 64, 7, 2))
    features.add_module('norm0', nn.BatchNorm2d(64))
    channels = 64
    for block, count in enumerate(counts, start=1):
      layers = nn.Sequential()
      for index in range(1, count + 1):
        layers.add_module(f'denselayer{index}', DenseLayer(channels))
        channels += 32
      features.add_module(f'denseblock{block}', layers)
      if block < len(counts):
        features.add_module(f'transition{block}', Transition(channels))
        channels //= 2
    features.add_module('norm5', nn.BatchNorm2d(channels))
    self.features = features
    self.classifier = nn.Linear(channels, classes)

  def forward(self, x):
    for name, module in self.features.named_children():
      x = module(x)
      if name.startswith('norm'):
        x = F.relu(x)
      if name == 'norm0' and not self.small:
        x = F.max_pool2d(x, 3, 2, 1)
    return self.classifier(x.mean((2, 3)))


class VGG(nn.Module):
  """A sequence of convolution, BatchNorm, ReLU, with pooling between.

  With `hidden`, three linear layers follow, as in the original VGG.
  """

  def __init__(self, plan, classes, bias, hidden=None):
    super().__init__()
    layers, channels = [], 3
    for width in plan:
      if width == 'pool':
        layers.append(nn.MaxPool2d(2))
        continue
      layers.append(conv(channels, width, 3, bias=bias))
      layers += [nn.BatchNorm2d(width), nn.ReLU()]
      channels = width
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Linear(channels, classes)
    if hidden is not None:
      self.classifier = nn.Sequential(
        nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(),
        nn.Linear(hidden, classes),
      )  # fmt: skip

  def forward(self, x):
    return self.classifier(self.features(x).flatten(1))
