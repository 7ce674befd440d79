"""Records a real vLLM on a GPU or a CPU, as folders that `servesim validate` replays (see README.md)."""
