"""XLA FFI handlers of quire; use quire.integrations.jax."""

from typing import Any


def handlers() -> dict[str, Any]:
    """A capsule for each operation, by name."""
