"""Responses of the tuned and the untuned model to held-out prompts, and what they are worth."""

from rlhf.inference.stage import InferenceResult, run_inference

__all__ = ["InferenceResult", "run_inference"]
