"""Train a first stage: the loop is ldm/training/train_autoencoder.py."""

from ldm.training.launch import main

if __name__ == "__main__":
    main("train_autoencoder")
