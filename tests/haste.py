"""Programs compiled in haste, for tests: most run for moments, and optimising takes far longer.

A prefill and a decoding program of three layers then take 1.8 CPU seconds to trace and compile, not
6.8. Tests that are about the program of a user's run take the fixture `optimised`.
"""

import functools
import os
from collections.abc import Callable

OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def environment() -> dict[str, str]:
    """For a process that compiles everything in haste; to be set before it imports JAX."""
    flags = [f"--{name}={str(value).lower()}" for name, value in OPTIONS.items()]
    flags = [os.environ.get("XLA_FLAGS", ""), *flags]
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(flags)}


@functools.cache
def _compile() -> Callable:
    """`compile` as JAX has it."""
    import jax

    return jax.stages.Lowered.compile


def optimise(programs: bool) -> None:
    """Whether what this process compiles from now on is optimised."""
    import jax

    jax.config.update("jax_disable_most_optimizations", not programs)
    hasty = functools.partialmethod(_compile(), compiler_options=OPTIONS)
    jax.stages.Lowered.compile = _compile() if programs else hasty
