"""SFT, reward models and PPO on a Megatron TP x PP x DP mesh."""
