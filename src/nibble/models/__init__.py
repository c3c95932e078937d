"""transformers models on the meta device, and what must be known of a family."""

from nibble.models.build import Built, build, load_config
from nibble.models.family import Family, LogitTransform
from nibble.models.initialise import Tie, find_ties, finish, materialise, tie_
from nibble.models.tokenizer import check_vocabulary, load_tokenizer

__all__ = [
    "Built",
    "Family",
    "LogitTransform",
    "Tie",
    "build",
    "check_vocabulary",
    "find_ties",
    "finish",
    "load_config",
    "load_tokenizer",
    "materialise",
    "tie_",
]
