"""Nothing is compiled: metadata lives in pyproject.toml, and this file serves tools that still look for it."""

from setuptools import setup

setup()
