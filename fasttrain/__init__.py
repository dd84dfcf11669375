"""Direct Preference Optimization for vision-language models, fast and exact."""

__version__ = "0.1.0"
