"""Responses of the tuned and the untuned model to held-out prompts, and how good they are."""

from rlhf.inference.stage import InferenceResult, run_inference

__all__ = ["InferenceResult", "run_inference"]
