"""Model names of Google's `rlhf_pipeline`, and their equivalents on the Hugging Face Hub."""

from rlhf.config.describe import nearest

# Google's T5 checkpoints are Flan-T5; its llama-2 checkpoints are Meta's.
HUB_NAMES = {
    "t5-small": "google/flan-t5-small",
    "t5-large": "google/flan-t5-large",
    "t5-xl": "google/flan-t5-xl",
    "t5-xxl": "google/flan-t5-xxl",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-13b-chat": "meta-llama/Llama-2-13b-chat-hf",
}
# Names that mean another model on the Hub: the original T5, not Flan-T5.
AMBIGUOUS = frozenset({"t5-small", "t5-large"})
# Models that only Google can run: their weights cannot be downloaded.
_CLOSED = ("bison", "gecko", "otter", "unicorn", "elephant", "gemini", "palm")


def hub_name(reference: str) -> str:
    """Return the address of a base model: translate Google's names, keep anything else.

    Args:
        reference: `t5-small`, `llama-2-7b`, …, a Hub id, or a local, `gs://` or `/gcs/` folder.

    Raises:
        ValueError: If the model's weights are not available, or a bare name is unknown.
    """
    # Google's pipeline also accepts LLAMA_2_7B.
    if (google := reference.lower().replace("_", "-")) in HUB_NAMES:
        return HUB_NAMES[google]
    bare = reference.split("/")[-1].split("@")[0].lower()
    if "/" not in reference and any(name in bare for name in _CLOSED):
        raise ValueError(
            f"{reference} cannot be tuned here, its weights are not available; give one of "
            f"{', '.join(HUB_NAMES)}, a Hub id such as meta-llama/Llama-3.2-1B, or a gs:// folder"
        )
    if "/" not in reference:
        raise ValueError(
            f"unknown model {reference!r}{nearest(reference, HUB_NAMES)}; expected one of "
            f"{', '.join(HUB_NAMES)}, a Hub id such as google/flan-t5-base, or a gs:// folder"
        )
    return reference
