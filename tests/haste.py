"""Programs compiled in haste, for tests: most run for moments, and optimising takes far longer.

A prefill and a decoding program of three layers then take 1.8 CPU seconds to trace and compile, not
6.8. Tests that are about the program of a user's run take the fixture `optimised`.
"""

import jax

compile_as_users_do = jax.stages.Lowered.compile
OPTIONS = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def compile_in_haste(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return compile_as_users_do(lowered, compiler_options=OPTIONS)


def optimise(programs: bool) -> None:
    """Whether what this process compiles from now on is optimised."""
    jax.config.update("jax_disable_most_optimizations", not programs)
    jax.stages.Lowered.compile = compile_as_users_do if programs else compile_in_haste
