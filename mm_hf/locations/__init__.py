"""What one forward of an unmodified model tells about its locations: patches or tokens."""

from .blocks import BlockMixing, Blocks, BlockTaps, find_blocks
from .hooks import LocationOutput, Taps, extract, resolve_attention
from .plan import LocationError, Plan
from .probe import probe
from .registry import register

__all__ = [
    "BlockMixing",
    "BlockTaps",
    "Blocks",
    "LocationError",
    "LocationOutput",
    "Plan",
    "Taps",
    "extract",
    "find_blocks",
    "probe",
    "register",
    "resolve_attention",
]
