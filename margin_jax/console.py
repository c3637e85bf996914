"""What a console script needs that `python -m` has by itself."""

import sys

from absl import flags


def adopt_flags(module: str, doc: str | None) -> None:
  """Lets --help show the flags and the docstring of `module`.

  It asks the main module, which of a console script is the script.
  """
  if module == '__main__':
    return
  for flag in flags.FLAGS.get_key_flags_for_module(module):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  sys.modules['__main__'].__doc__ = doc
