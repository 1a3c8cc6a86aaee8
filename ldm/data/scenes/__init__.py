"""`data.path: scenes`: synthetic captioned scenes, composed of drawings of common things."""
