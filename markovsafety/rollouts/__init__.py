"""What language models said: rollouts as token ids, the engines that sample them, the judges that name their outcome."""

from __future__ import annotations

from .parquet import read_rollouts, write_rollouts
from .rollouts import Ragged, Rollouts

__all__ = ["Ragged", "Rollouts", "read_rollouts", "write_rollouts"]
