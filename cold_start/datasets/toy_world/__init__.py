"""A toy world: clips of one colored shape, prompts that ask for such clips, and judgements of how well they fit."""
