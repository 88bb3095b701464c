"""Parts that the fields of several stages have in common."""

from typing import Any

from rlhf.config.common import option

PATHS = (
    "A file, glob, folder, gs:// or other address, or Hub id USER/SET[@REVISION][:[CONFIG/]SPLIT]; "
    '{"path": …, "weight": …, "limit": …}; or several of these'
)


def compile_decode() -> Any:
    """Declare the field of compiled decoding."""
    return option(
        False,
        "Decode with one compiled step (torch.compile; a CUDA graph on a GPU) instead of layer by "
        "layer: about a minute to compile, then fewer kernel launches. Needs Triton on a GPU, "
        "a C++ compiler on a CPU. Batches and prompts are padded to their limits, finished rows "
        "stay in the batch, and the cache is never freed. Rounding differs, so bfloat16 draws "
        "other samples from the same distribution.",
    )


def reward_model_label() -> Any:
    """Declare the field that chooses a label of a classifier given by `reward_model_path`."""
    return option(
        None,
        "Label (index or name) whose logit is the score, if reward_model_path is a classifier "
        "with several.",
    )


def ties() -> Any:
    """Declare the field that says what becomes of answers that are as good as each other."""
    return option(
        "drop",
        "Pairs of tied answers (equal scores, choice tie). drop: left out and counted; keep: half "
        "a choice either way, so that the loss pulls their scores together.",
    )


def tuned_base(pipeline: Any) -> dict[str, Any]:
    """Return the base of the stages after SFT: its result, or what the user gave."""
    if "sft" not in pipeline.stages():
        return {}
    return {"base_model": f"{pipeline.stage_dir('sft')}/merged", "revision": None}


def reward_model_of(pipeline: Any) -> str:
    """Return the folder or Hub id of the reward model that was given, or that is trained."""
    given: str | None = pipeline.reward_model_path
    return pipeline.stage_dir("reward_model") if given is None else given
