"""Checkpoints with Orbax: the last two and the best, saved in the background.

A checkpoint is the whole `TrainState`, as plain arrays that do not know how
many devices wrote them, and a JSON dictionary about the run.
"""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any

FOLDER = 'checkpoints'
_NOT_EVALUATED = -1.0


class Checkpoints:
  """Four functions around an Orbax `CheckpointManager`."""

  def __init__(self, workdir: str, keep_every: int | None = None):
    """Opens, or creates, `workdir`/checkpoints.

    Args:
      workdir: the run's folder.
      keep_every: checkpoints at its multiples are never deleted.
    """
    policies = ocp.checkpoint_managers
    keep = [
      policies.LatestN(2),
      policies.BestN(get_metric_fn=lambda metrics: metrics['accuracy'], n=1),
    ]
    if keep_every is not None:
      keep.append(policies.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      pathlib.Path(workdir).absolute() / FOLDER,
      options=ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics['accuracy'],
        preservation_policy=policies.AnyPreservationPolicy(keep),
      ),
    )

  def save(
    self, state: PyTree, info: dict[str, Any], accuracy: float | None
  ) -> None:
    """Saves state and info at `state.step`; returns while files are written.

    Args:
      state: the train state. It is copied first: the step that follows
        donates its memory.
      info: JSON-serialisable.
      accuracy: on the validation split, which decides the best checkpoint (of
        equals the latest); None if this step was not evaluated.
    """
    host = jax.tree.map(np.array, jax.device_get(state))
    self._manager.save(
      int(host.step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(host), info=ocp.args.JsonSave(info)
      ),
      metrics={
        'accuracy': _NOT_EVALUATED if accuracy is None else accuracy,
      },
    )

  def restore(
    self, target: PyTree, step: int | None = None
  ) -> tuple[PyTree, dict[str, Any]] | None:
    """The state and info of a step, by default the latest, or None.

    Args:
      target: a state of the same structure, shapes and dtypes.
      step: which checkpoint.
    """
    step = self._manager.latest_step() if step is None else step
    if step is None:
      return None
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(
          jax.tree.map(np.asarray, jax.device_get(target))
        ),
        info=ocp.args.JsonRestore(),
      ),
    )
    return restored.state, restored.info

  def info(self) -> dict[str, Any] | None:
    """The info of the latest checkpoint, which needs no target, or None."""
    step = self._manager.latest_step()
    if step is None:
      return None
    args = ocp.args.Composite(info=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args).info

  def steps(self) -> list[int]:
    """The steps that are kept."""
    return sorted(self._manager.all_steps())

  def close(self) -> None:
    """Waits for the last save and raises if it failed."""
    self._manager.wait_until_finished()
    self._manager.close()
