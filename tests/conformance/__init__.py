"""Random workloads through servesim and through vLLM's own scheduler; see docs/conformance.md."""
