"""`--tool-call-parser zaya_xml` of a plain `vllm serve`, arguments streamed; `mrsa serve` reads calls by itself.

ZAYA1 writes a call as Qwen3 does, between marks of its own. vLLM has its parser of these made to be subclassed so.
"""

from __future__ import annotations

from vllm.parser.engine.adapters import make_adapters
from vllm.parser.qwen3 import Qwen3Parser


class ZayaParser(Qwen3Parser):  # type: ignore[misc]  # vLLM is no typed package here
    """Qwen3's, but for the marks."""

    CONFIG_NAME = "zaya_xml"
    TOOL_START = "<zyphra_tool_call>"
    TOOL_END = "</zyphra_tool_call>"


_, ZayaToolParser = make_adapters(ZayaParser)
