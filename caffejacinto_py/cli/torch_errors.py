"""Errors of torch that are no fault of the program, in sentences. By their words: torch is not imported for this."""

from __future__ import annotations

MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
GPU = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS", "HIP error")


def explain(error: Exception) -> tuple[str, str] | None:
    """(what happened, hint), None for an error that is none of these."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    first = " ".join(text.split("\n", 1)[0].split())
    if type(error).__name__ == "OutOfMemoryError" or any(words in text for words in MEMORY):
        hint = "a smaller batch_size with a larger iter_size, --memory-budget (docs/memory.md), or --precision bf16"
        return f"out of memory: {first}", hint
    if "device-side assert" in text:
        what = "a GPU kernel refused a number that it uses as a place: most often a label outside 0..classes-1"
        return f"{what} ({first})", "run a few iterations with --gpu -1: the CPU says which layer and which value"
    if any(words in text for words in GPU):
        hint = "CUDA_LAUNCH_BLOCKING=1 in the environment makes --debug show the call that failed"
        return f"the GPU failed: {first}", hint
    return None
