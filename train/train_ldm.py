"""Train a text-to-image diffusion model: the loop is ldm/training/train_ldm.py."""

from ldm.training.launch import main

if __name__ == "__main__":
    main("train_ldm")
