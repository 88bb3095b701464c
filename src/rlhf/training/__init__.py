"""The training loop shared by SFT, reward model and PPO, and its parts."""
