"""A toy world: clips of one colored shape, prompts that ask for such clips, and judgements of how well they match.

scene (what is shown, and the rules of scoring) <- texts, looks <- render <- world (pairs) <- tables (CSV files).
"""
