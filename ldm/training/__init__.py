"""What the scripts in train/ are made of."""
