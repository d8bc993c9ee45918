"""How a model is written for other tools. Needs no JAX: the command line reads these words before it loads anything."""

from typing import Literal

Form = Literal["merged", "adapter"]  # whole weights, or a LoRA alone
Dtype = Literal["float32", "float16", "bfloat16"]
