"""ZAYA1 for stock vLLM, as its plugin. Nothing outside this room but its engine knows vLLM; nothing here knows HTTP.

`model` is the network, `cca` its attention, `state` what that attention remembers of a sequence, `router` its experts;
`versions` holds what differs between vLLM's releases, `tool_calls` the parser for a plain `vllm serve`. `checkpoint`
reads a folder and `ranks` knows how it can be divided, with neither vLLM nor torch.
"""

from __future__ import annotations

ARCHITECTURE = "ZayaForCausalLM"
TOOL_PARSER = "zaya_xml"


def register() -> None:
    """Make model and tool calls known to vLLM, which calls this in each of its processes (`vllm.general_plugins`)."""
    from vllm import ModelRegistry
    from vllm.tool_parsers import ToolParserManager

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    if TOOL_PARSER not in ToolParserManager.list_registered():
        ToolParserManager.register_lazy_module(TOOL_PARSER, f"{__name__}.tool_calls", "ZayaToolParser")
