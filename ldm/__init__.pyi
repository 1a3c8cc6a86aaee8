"""What `__init__.py` resolves when it is first used."""

from ldm.api import AutoencoderOptions as AutoencoderOptions
from ldm.api import EvaluationOptions as EvaluationOptions
from ldm.api import LikelihoodOptions as LikelihoodOptions
from ldm.api import SweepOptions as SweepOptions
from ldm.api import check_data as check_data
from ldm.api import evaluate as evaluate
from ldm.api import evaluate_autoencoder as evaluate_autoencoder
from ldm.api import evaluate_axes as evaluate_axes
from ldm.api import likelihood as likelihood
from ldm.data import DataConfig as DataConfig
from ldm.pipelines import Pipeline as Pipeline
from ldm.pipelines import SamplingParams as SamplingParams
from ldm.training.launch import TrainingResult as TrainingResult
from ldm.training.launch import train as train

__version__: str
