"""The HTTP server: models behind the addresses that clients of OpenAI, Anthropic, llama.cpp and Ollama know."""

from phiquant.server.settings import Model, Settings

__all__ = ["Model", "Settings"]
