"""Forward passes as plain Python over `kernels.ops`: one file per architecture, recorded once per load."""

from phiquant.model.recording import record
from phiquant.model.rope import Regime, Rope
from phiquant.model.weights import load_weights

__all__ = ["Regime", "Rope", "load_weights", "record"]
