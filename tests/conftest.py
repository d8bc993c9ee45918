"""Settings that every test runs under."""

import jax

# An accidental broadcast between ranks is a bug that a loss curve hides; here it is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")
