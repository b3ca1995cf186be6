"""What one forward of an unmodified model tells about its locations: patches or tokens."""

from .plan import LocationError, Plan
from .probe import probe
from .register import register
from .taps import LocationOutput, Taps, extract, resolve_attention

__all__ = ["LocationError", "LocationOutput", "Plan", "Taps", "extract", "probe", "register", "resolve_attention"]
