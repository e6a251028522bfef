"""Stage 2's engine: GRPO on the thoughts and Bradley-Terry on the scores, with Ray, FSDP2 and vLLM."""
