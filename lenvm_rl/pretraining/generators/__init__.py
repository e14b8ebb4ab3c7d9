"""Where rollouts come from: one small interface, three backends.

| class                   | backend                                            | exact resume              |
|-------------------------|----------------------------------------------------|---------------------------|
| `TransformersGenerator` | transformers' ``generate``, in process             | yes                       |
| `VLLMGenerator`         | vLLM in process                                    | as far as vLLM repeats    |
| `ServerGenerator`       | any OpenAI-compatible server, ``/v1/completions``  | as far as the server does |

A generator is a callable with a name; anything of the form of `Generator` serves. `create_generator` makes one by name.
"""

from .create import create_generator
from .interface import Generator, Skipped, row_seed
from .server import ServerGenerator
from .transformers_generate import TransformersGenerator
from .vllm_engine import VLLMGenerator

__all__ = [
    "Generator",
    "ServerGenerator",
    "Skipped",
    "TransformersGenerator",
    "VLLMGenerator",
    "create_generator",
    "row_seed",
]
