"""Convert, quantize and run Microsoft Phi models as GGUF."""
__version__ = "0.1.0"
