"""What one forward of an unmodified model tells about its locations: patches or tokens."""

from .blocks import BlockHooks, BlockMixing, Blocks, find_blocks
from .hooks import LocationHooks, LocationOutput, extract, resolve_attention
from .plan import LocationError, Plan
from .probe import probe
from .registry import register

__all__ = [
    "BlockHooks",
    "BlockMixing",
    "Blocks",
    "LocationError",
    "LocationHooks",
    "LocationOutput",
    "Plan",
    "extract",
    "find_blocks",
    "probe",
    "register",
    "resolve_attention",
]
