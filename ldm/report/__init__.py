"""What pages are made of: escaped markup, curves, pictures, and the shell around them. No scripts, no network."""
