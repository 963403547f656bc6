"""The extension as the WebUI sees it: the only part that imports gradio and page code."""

from .register import register

__all__ = ["register"]
