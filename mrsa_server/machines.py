"""What ZAYA1-8B takes on a GPU, from the GPU's data sheet and the model's shape. Only the CPU's figures were measured.

A decode step reads memory: the weights that its tokens need, and the KV cache. So its time is bytes over bandwidth, at
a stated share of the data sheet's figure, beside a fixed time for launches and sampling. A prefill computes: operations
over the data sheet's dense bf16 rate, at a stated share. A real vLLM may be off by a half either way.

Shape of the model (ZAYA1-8B report; 8.4 billion parameters, 0.76 billion active, 17.7 GB of weights): 16 experts and
the rest make 8.4 billion; one expert and the rest, without the embeddings (262,272 x 2,048, tied to the output), 0.76.
So an expert, all 40 layers together, has (8.4 - 0.54 - 0.76) / 15 = 0.473 billion parameters, and the 16 are 15.15 GB
in bf16. What is left of the 17.7 GB, the output matrix in fp32 among it, is read by every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.speed import EngineModel

KV_BYTES = 40 * 1024  # a token: 2 heads x 128 x (key, value) x 40 layers x 2 bytes
STATE_BYTES = 370_000  # a sequence: CCA's convolution window and delayed value, in fp32
WEIGHT_BYTES = 17.7e9
EXPERTS = 16  # one of them for each token and layer; the router's 17th choice, none, is left out
EXPERT_BYTES = 15.15e9  # of all of them
LOGIT_BYTES = 262_272 * 4  # a sequence and step, in fp32
FLOP_PER_TOKEN = 2 * (0.76e9 + 0.54e9)  # decoding, output matrix included
PREFILL_FLOP_PER_TOKEN = 2 * 0.76e9 + 4 * 1_024 * 40 * 8_000  # no output; attention at 8,000 tokens, half of C x tau

# Of the data sheet. Kernels that stream memory reach 0.7 to 0.85 of it; the low end, as experts are read in parts.
BANDWIDTH_SHARE = 0.7
# Small expert matrices keep matrix units less busy than the 0.4 to 0.5 of dense models of this size.
FLOP_SHARE = 0.25
# Of a step: 40 layers out of one CUDA graph, the sampler, and vLLM's scheduler between two steps.
STEP_S = 0.002
# Logits are read and written some ten times by the sampler (scaling, softmax, drawing).
LOGIT_PASSES = 10
# HTTP, tokens, one step that is under way.
REQUEST_S = 0.005
# vLLM's default `gpu_memory_utilization`, and what activations and graphs take of it.
MEMORY_SHARE = 0.9
WORK_BYTES = 4e9
# vLLM's `max_num_seqs`, as we set it: more streams gain little once all experts are read.
STREAMS = 256


# The embedded engine on two shared cores (SmolLM2-135M in fp32), as `python -m tests.bench.plan_check` found it.
CPU = EngineModel(step_s=0.033, kv_token_s=5.4e-6, prefill_tokens_per_s=1_600, kv_tokens=23_000, streams=256)


def zaya1(memory_bytes: float, bytes_per_s: float, flop_per_s: float) -> EngineModel:
    """ZAYA1-8B on vLLM on a GPU with such a data sheet; operations are those of dense bf16."""
    bandwidth, flops = BANDWIDTH_SHARE * bytes_per_s, FLOP_SHARE * flop_per_s
    return EngineModel(
        step_s=STEP_S + (WEIGHT_BYTES - EXPERT_BYTES) / bandwidth,
        stream_s=(2 * STATE_BYTES + LOGIT_PASSES * LOGIT_BYTES) / bandwidth + FLOP_PER_TOKEN / flops,
        kv_token_s=KV_BYTES / bandwidth,
        experts=EXPERTS,
        experts_s=EXPERT_BYTES / bandwidth,
        prefill_tokens_per_s=flops / PREFILL_FLOP_PER_TOKEN,
        request_s=REQUEST_S,
        kv_tokens=int((MEMORY_SHARE * memory_bytes - WEIGHT_BYTES - WORK_BYTES) / KV_BYTES),
        streams=STREAMS,
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """What serves one engine.

    Attributes:
        label: Its name, and the model's where that is not ZAYA1-8B.
        engine: Its constants.
        price: US dollars an hour, an assumption: what clouds asked for in 2025, on demand, to the half dollar.
        context_tokens: Of the model, the longest prompt and generation together.
    """

    label: str
    engine: EngineModel
    price: float
    context_tokens: int = 131_072


# Memory, bandwidth and operations as in NVIDIA's and AMD's data sheets.
MACHINES: Mapping[str, Machine] = {
    "h200": Machine("NVIDIA H200 SXM", zaya1(141e9, 4.8e12, 989e12), 3.5),
    "h100": Machine("NVIDIA H100 SXM", zaya1(80e9, 3.35e12, 989e12), 2.5),
    "a100-80g": Machine("NVIDIA A100 SXM 80 GB", zaya1(80e9, 2.04e12, 312e12), 1.5),
    "l40s": Machine("NVIDIA L40S", zaya1(48e9, 0.864e12, 362e12), 1.0),
    "mi300x": Machine("AMD MI300X", zaya1(192e9, 5.3e12, 1307e12), 3.0),
    "cpu": Machine("two CPU cores with SmolLM2-135M", CPU, 0.1, 4_096),
}
