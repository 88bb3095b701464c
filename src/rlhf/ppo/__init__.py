"""What a PPO step consists of."""
