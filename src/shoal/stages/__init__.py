"""The stages of a run, in order: anchors, the start (where the recipe asks for a gradient), search (generation after generation), finalists.

`evaluator` does or replays one evaluation; `course` says how a generation is to be searched; `values` turns item scores
into what is maximised. Every stage reads the journal first, so that a resumed run repeats nothing and decides the same.
"""
