"""What one forward of an unmodified model tells about its locations: patches or tokens."""

from .blocks import BlockMixing, Blocks, BlockTaps, find_blocks
from .plan import LocationError, Plan
from .probe import probe
from .register import register
from .taps import LocationOutput, Taps, extract, resolve_attention

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
