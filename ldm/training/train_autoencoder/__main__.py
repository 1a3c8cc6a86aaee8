"""`python -m ldm.training.train_autoencoder`: the loop, launched with all that plugs in."""

from ldm.training.launch import main

main("train_autoencoder")
