"""What `__init__.py` resolves when it is first used."""

from ldm.pipelines import Pipeline as Pipeline
from ldm.training.launch import TrainingResult as TrainingResult
from ldm.training.launch import train as train

__version__: str
