"""Turn captioned images into a text-to-image model that its owner can run, share and trust.

    from ldm import Pipeline, evaluate, train

    Pipeline.from_pretrained("runs/digits/pipeline")("a handwritten three").images[0].save("three.png")

Public names are resolved when they are first used (PEP 562), so that `import ldm` costs nothing and who only
reads a config, or asks the command line for help, does not wait for torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"
__all__ = [
    "AutoencoderOptions",
    "DataConfig",
    "EvaluationOptions",
    "LikelihoodOptions",
    "Pipeline",
    "SamplingParams",
    "SweepOptions",
    "TrainingResult",
    "__version__",
    "check_data",
    "evaluate",
    "evaluate_autoencoder",
    "evaluate_axes",
    "likelihood",
    "train",
]

_HOME_OF = {  # __init__.pyi says the same to type checkers
    **dict.fromkeys(__all__, "ldm.api"),
    "DataConfig": "ldm.data",
    "Pipeline": "ldm.pipelines",
    "SamplingParams": "ldm.pipelines",
    "TrainingResult": "ldm.training.launch",
    "train": "ldm.training.launch",
}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value  # the next look-up finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
