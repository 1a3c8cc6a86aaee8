"""Metrics of models and first stages: records; `ldm.report` renders them."""
