"""The operators on a model: what changes its transitions. `augment` is here: it works on token ids, without torch.

Whatever needs torch is imported by the module that needs it, never by this file.
"""

from .augment import Row, Triplet, mixed, recover, recovery, rotations, token_share

__all__ = ["Row", "Triplet", "mixed", "recover", "recovery", "rotations", "token_share"]
