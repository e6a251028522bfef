"""A toy world: clips of one colored shape, prompts that ask for such clips, and judgements of how well they match.

    scene    Scene, Request and their sampling; scores and preferences
    texts    Request -> prompt; Request and the Scene an annotator saw -> CoT -> scores
    looks    textures and shapes, as numpy arrays
    render   Scene and Nuisance -> frames -> H.264 file
    world    seed, split and index -> Pair: request, prompt, two clips with their CoTs, label
    tables   Pairs -> rows of the CSV files

Imports: scene <- texts, looks <- render <- world <- tables <- make_toy_world.py. The tiny base (../../model) needs
scene, texts and render only.
"""
