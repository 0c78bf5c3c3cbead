"""What a chain is, and how evidence becomes one."""

from .chain import Chain, Evidence
from .storage import read_chain, write_chain

__all__ = ["Chain", "Evidence", "read_chain", "write_chain"]
