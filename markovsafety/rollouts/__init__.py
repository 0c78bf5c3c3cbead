"""What language models said: rollouts as token ids, engines that sample them, judges that name their outcome."""

from __future__ import annotations

from .engines.ray import spread
from .judges import Judge, Verdict, judge
from .lexicon import LexiconJudge
from .parquet import read_rollouts, write_rollouts
from .rollouts import Ragged, Rollouts
from .sample import sample
from .sums import Sums
from .tally import tally
from .template import Template

__all__ = [
    "Judge",
    "LexiconJudge",
    "Ragged",
    "Rollouts",
    "Sums",
    "Template",
    "Verdict",
    "judge",
    "read_rollouts",
    "sample",
    "spread",
    "tally",
    "write_rollouts",
]
