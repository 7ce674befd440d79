"""What the parts of a latency and the causes of a tail are called, and the colours of the parts."""

from __future__ import annotations

from servesim.report.charts import BLUE, ORANGE, PALE_GREY, PURPLE, SKY, VERMILLION

__all__ = ["CAUSE_WORDS", "PART_COLOURS", "PART_LABELS"]

PART_LABELS = {
    "joining": "Waiting: the steps in flight at arrival",
    "slot": "Waiting for a slot",
    "kv_blocks": "Waiting for KV blocks",
    "tokens": "Waiting for tokens (budget of a step)",
    "prefill": "Prefill of the own prompt",
    "interference": "Interference by others' prompts",
    "weights": "Decode: weights",
    "kv_reads": "Decode: KV reads",
    "compute": "Decode: compute",
    "communication": "Decode: communication",
    "host": "Host",
    "transfer": "Copying KV blocks",
    "preemption": "Preemption and recomputing",
    "batch": "Waiting for the end of the batch",
    "failure": "Lost to a failed replica",
}
PART_COLOURS = {
    "joining": "#8c949e",
    "slot": "#b8a9d9",
    "kv_blocks": PURPLE,
    "tokens": SKY,
    "prefill": BLUE,
    "interference": VERMILLION,
    "weights": "#009E73",
    "kv_reads": "#6cc5a6",
    "compute": "#c2b21d",
    "communication": "#7a4e1d",
    "host": "#444b52",
    "transfer": "#a0522d",
    "preemption": ORANGE,
    "batch": PALE_GREY,
    "failure": "#a4133c",
}

CAUSE_WORDS: dict[str, tuple[str, str, str]] = {
    "kv": (
        "the KV cache is too small",
        "requests wait until others give blocks back, or are preempted and computed anew",
        "hold more tokens (fp8 KV cache, smaller weights, more of the memory, more GPUs), or admit fewer",
    ),
    "slots": (
        "too few slots",
        "requests wait for one of max_num_seqs places though memory would hold them",
        "raise engine.max_num_seqs",
    ),
    "interference": (
        "prompts interfere with decodes",
        "a step that computes others' prompts is long, and every request that decodes in it waits",
        "make the chunks smaller, or compute prompts elsewhere",
    ),
    "host": (
        "the host is the bottleneck",
        "the GPU waits for the scheduler, for inputs to be prepared and for kernels to be launched",
        "let the host work beside the GPU (async scheduling, a newer version, CUDA graphs)",
    ),
    "bandwidth": (
        "memory bandwidth",
        "every step reads all weights and the KV cache of its requests, and that takes its time",
        "read fewer bytes (fp8 weights or KV cache), or from more or faster memory",
    ),
    "link": (
        "the link between the GPUs",
        "every layer's partial sums travel between the tensor-parallel GPUs",
        "use fewer GPUs per replica, or GPUs with a faster link",
    ),
    "cold_cache": (
        "a cold prefix cache",
        "prompts that begin alike are computed again and again",
        "switch prefix caching on, and keep prompts that begin alike on one replica",
    ),
    "bursty": (
        "bursty arrivals",
        "requests come in bunches; the queue forms though the mean load is served with ease",
        "keep headroom for the bunches (faster GPUs, more replicas), or smooth them before they arrive",
    ),
    "oversize": (
        "oversize prompts",
        "a few prompts are far longer than the rest: they take long, and others wait beside or behind them",
        "smaller chunks, or replicas of their own for long prompts",
    ),
    "compute": (
        "computing takes the time",
        "prompts take as long as the GPU needs for them, alone and in the steps of others",
        "compute less (prefix caching, fp8), or on more or faster GPUs",
    ),
    "router": (
        "the router spreads the load unevenly",
        "requests wait at one replica while another has room",
        "let the router look at the replicas (hardware.router: least-outstanding)",
    ),
    "failure": (
        "a replica failed",
        "its requests began anew elsewhere, and the replicas that were left had its share of the load, too",
        "keep a replica more than the load needs, or headroom in each",
    ),
    "autoscaler": (
        "the autoscaler comes late, or stops too soon",
        "replicas are ordered when the load is there already, and requests wait until they have started",
        "keep more replicas, order them earlier (a lower target), or shorten their start-up",
    ),
    "kv_link": (
        "the link between prefill and decode",
        "the KV cache of every prompt goes from the replica that computed it to the one that decodes",
        "use a faster link, fewer bytes (fp8 KV cache), or replicas that do both",
    ),
    "batch": (
        "static batching",
        "a batch ends with its longest request, and the next one begins only then",
        "batch continuously",
    ),
}
"""The matter, what it means, what to do."""
