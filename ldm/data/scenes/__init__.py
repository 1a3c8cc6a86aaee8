"""`data.path: scenes`: drawings of common things, composed into captioned scenes by code, without end."""
