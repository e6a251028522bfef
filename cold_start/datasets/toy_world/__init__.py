"""A toy world: clips of one colored shape, prompts that ask for such clips, and judgements of how well they fit.

    scene    Scene, Request and their sampling; the scores and the preference of clips
    texts    a Request becomes a prompt; a Request and what an annotator saw become a CoT, a CoT becomes scores
    looks    textures and shapes, as numpy fields
    render   a Scene and a Nuisance become frames and an H.264 file
    world    a seed, a split and an index become a Pair: request, prompt, two clips with their CoTs, label
    tables   Pairs become the rows of the CSV files

scene <- texts, looks <- render <- world <- tables <- make_toy_world.py. The tiny base (../../model) needs scene, texts
and render only.
"""
