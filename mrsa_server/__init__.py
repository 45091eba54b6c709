"""The server: serves the method of `harness` over OpenAI's API, on engines of several kinds."""

__version__ = "0.1.0"
