"""NumPy: slow and exact, the definition that every other backend is tested against."""

from phiquant.kernels.reference.backend import ReferenceBackend, ReferenceExecutable

__all__ = ["ReferenceBackend", "ReferenceExecutable"]
