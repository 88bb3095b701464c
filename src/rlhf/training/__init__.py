"""The loop that SFT, reward model and PPO share, and what it needs."""
