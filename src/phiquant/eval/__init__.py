"""How good a model is: perplexity of a text, and divergence between two forms of the same model."""

from .kl import Divergence, LogitsSource, compare_logits, divergence
from .perplexity import Perplexity, perplexity

__all__ = ["Divergence", "LogitsSource", "Perplexity", "compare_logits", "divergence", "perplexity"]
