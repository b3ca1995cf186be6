"""Locations of an unmodified model (patches, tokens): their logits, mask and attention, from its own forward.

    probe(model, batch)                         probe.py: once per model
        Recording    calls of all modules, and all attention, in one forward        recording.py, attention/recording.py
        candidates   traced back from the logits to the tokens                      head.py, pools.py
        verified     reproduces the logits; its pool reads what has a gradient
              |
              v
    Plan                                        plan.py: frozen, printable, saved as JSON
        source, layout      the module that returns the tokens
        pool, chain         the tokens that the head reads, and its steps to the logits
        prefix, text        the tokens that are not locations
        attention, query    the attention that weights the labels
              |
              v
    LocationHooks(model, plan)                  hooks.py: installed once, inactive outside of `capture`
        with hooks.capture(inputs, kind):       in each forward
            output = model(**inputs)            source hook stores the tokens, attention hook one row of attention
            hooks.to_output(...)                applies the head at every location
              |
              v
    LocationOutput(logits, token_logits, mask, attention)

`extract` runs all of this in one call. `find_blocks` (blocks.py) finds the blocks in the same way, for mixing hidden
states. `register` (registry.py) adds a head that the probe cannot find.
"""

from .attention.weights import resolve_attention
from .blocks import BlockHooks, BlockMixing, Blocks, find_blocks
from .hooks import LocationHooks, LocationOutput, extract
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
