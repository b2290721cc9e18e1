"""What answers look like, as the document at /openapi.json tells it; a file for each family of endpoints.

These are declarations alone: answers are made where they are served, and tests hold each of them against its shape.
TypedDict is that of typing_extensions, the one that pydantic can read with Python 3.11.
"""
