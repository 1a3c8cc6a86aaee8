"""`python -m ldm.training.train_ldm`: the loop, launched with all that plugs in."""

from ldm.training.launch import main

main("train_ldm")
