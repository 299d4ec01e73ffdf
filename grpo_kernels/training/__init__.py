"""A thin GRPO loop for any Hugging Face causal language model: rollouts, rewards, updates, evaluation, recipes."""
